"""Measure what each low-bit method is worth on a checkpoint such as SmolLM2, by whole runs.

    python scripts/measure/low_bit.py ~/.cache/compressor/smollm2-135m --json rows.json

Every row is a recipe: it is run, its files are read back, and their quantized inputs and KV cache
are applied while held-out text goes through them. The text is the bundled one, in windows cut from
its beginning; calibration is the other bundled text. Rows of "outliers" are measured on a copy of
the checkpoint whose norms are multiplied by 64 in a few channels, and whose weights are divided by
it there: a power of two, so that the copy computes the same function to the last bit.

A comparison is of two rows on the same windows; its standard error is over windows, of the paired
differences in mean negative log-likelihood. A difference below two standard errors is reported as
none. With --json, rows that the file already holds for the same settings are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import windows
from safetensors.torch import save_file
from torch import Tensor

from compressor.checkpoint.source import Source, open_source
from compressor.errors import CompressError, Problems
from compressor.evaluate.perplexity import token_scores
from compressor.numerics.folding import fold
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.sweep import FinalStates, StreamedModel, run_blocks
from compressor.runner.tokenizer import load_tokenizer

CHANNELS, FACTOR, SEED = 6, 64.0, 17


@dataclass(frozen=True)
class Row:
    """One measured recipe.

    outliers  on the copy with planted outliers
    untie     write a tied lm_head apart, which a rotation needs
    """

    name: str
    passes: tuple[Any, ...] = ()
    format: str = "compressed-tensors"
    outliers: bool = False
    untie: bool = False


def rows_of(group: int) -> list[Row]:
    """All rows, for groups of `group` where a method has groups."""

    def rtn(bits: int, size: int | None = group, **more: Any) -> dict[str, Any]:
        return {"rtn": {"bits": bits, "group_size": size, **more}}

    def gptq(bits: int, size: int | None = group, **more: Any) -> dict[str, Any]:
        return {"gptq": {"bits": bits, "group_size": size, **more}}

    def four(rule: str, activations: str = "none") -> dict[str, Any]:
        return {"nvfp4": {"rule": rule, "activations": activations}}

    def smooth(**more: Any) -> dict[str, Any]:
        return {"smoothquant": {"bits": 8, **more}}

    naive = rtn(8, None, activations="token")
    inputs = {"awq": {"search": "inputs"}}
    return [
        Row("baseline"),
        Row("w8a8 naive", (naive,)),
        Row("w8a8 smoothquant, published alpha", (smooth(),)),
        Row("w8a8 smoothquant, alpha 0.5", (smooth(alpha=0.5),)),
        Row("w8a8 smoothquant, searched", (smooth(alpha="search"),)),
        Row("w8a8 smoothquant, searched, with up", (smooth(alpha="search", fold_up=True),)),
        Row("w8a8 smoothquant O1", (smooth(weights="tensor"),)),
        Row("w8a8 smoothquant O3", (smooth(weights="tensor", activations="static"),)),
        Row(
            "w8a8 smoothquant + gptq",
            ({"smoothquant": {"alpha": "search"}}, gptq(8, None, activations="token")),
        ),
        Row(
            "w8a8 smoothquant + gptq, with up",
            (
                {"smoothquant": {"alpha": "search", "fold_up": True}},
                gptq(8, None, activations="token"),
            ),
        ),
        Row("fp8 dynamic", ("fp8",)),
        Row("fp8 static", ({"fp8": {"scales": "static"}},)),
        Row("fp8 dynamic, fp8 cache", ("fp8", "kv_cache")),
        *(Row(f"nvfp4 rtn {rule}", (four(rule),)) for rule in ("static_6", "static_4", "mse")),
        *(Row(f"nvfp4 rtn {rule}", (four(rule),)) for rule in ("mae", "abs_max")),
        *(Row(f"nvfp4 awq {rule}", ("awq", four(rule))) for rule in ("static_6", "mse")),
        *(Row(f"nvfp4 gptq {r}", (nvfp4_gptq(r),)) for r in ("static_6", "mse")),
        *(Row(f"nvfp4 w4a4 {r}", (four(r, "calibrated"),)) for r in ("static_6", "mse")),
        Row("nvfp4 w4a4 awq mse", (inputs, four("mse", "calibrated"))),
        *(Row(f"int{bits} rtn", (rtn(bits),)) for bits in (4, 3)),
        *(Row(f"int{bits} gptq", (gptq(bits),)) for bits in (4, 3)),
        *(Row(f"int{bits} awq", ({"awq": {}}, rtn(bits))) for bits in (4, 3)),
        Row("int4 rotated gptq", ("rotate", gptq(4)), untie=True),
        Row(
            "w4a8kv4 naive",
            (
                {"progressive": {"group_size": group, "gptq": False, "clip": False}},
                {"kv_cache": {"element": "int4"}},
            ),
            format="qserve",
        ),
        Row("w4a8kv4 qoq", ({"qoq": {"group_size": group}},), format="qserve", untie=True),
        Row(
            "w4a8kv4 qoq, searched attention",
            ({"qoq": {"group_size": group, "attention_alpha": "search"}},),
            format="qserve",
            untie=True,
        ),
        Row("outliers: baseline", outliers=True),
        Row("outliers: w8a8 naive", (naive,), outliers=True),
        Row("outliers: w8a8 smoothquant", (smooth(alpha="search"),), outliers=True),
        Row("outliers: fp8 dynamic", ("fp8",), outliers=True),
        Row("outliers: nvfp4 w4a4 mse", (four("mse", "calibrated"),), outliers=True),
    ]


def nvfp4_gptq(rule: str) -> dict[str, Any]:
    """GPTQ on the grid of NVFP4."""
    return {"gptq": {"grid": "nvfp4", "rule": rule}}


CLAIMS = (
    ("w8a8 smoothquant, searched", "w8a8 naive"),
    ("w8a8 smoothquant, searched, with up", "w8a8 naive"),
    ("w8a8 smoothquant + gptq", "w8a8 smoothquant, searched"),
    ("w8a8 smoothquant + gptq, with up", "w8a8 smoothquant, searched, with up"),
    ("w8a8 smoothquant, searched, with up", "w8a8 smoothquant, searched"),
    ("nvfp4 rtn mse", "nvfp4 rtn static_6"),
    ("nvfp4 awq mse", "nvfp4 awq static_6"),
    ("nvfp4 gptq mse", "nvfp4 gptq static_6"),
    ("nvfp4 w4a4 mse", "nvfp4 w4a4 static_6"),
    ("nvfp4 w4a4 awq mse", "nvfp4 w4a4 mse"),
    ("int4 gptq", "int4 rtn"),
    ("int3 gptq", "int3 rtn"),
    ("int4 awq", "int4 rtn"),
    ("int4 rotated gptq", "int4 gptq"),
    ("w4a8kv4 qoq", "w4a8kv4 naive"),
    ("w4a8kv4 qoq, searched attention", "w4a8kv4 qoq"),
    ("outliers: w8a8 smoothquant", "outliers: w8a8 naive"),
)
"""(better, worse) rows."""


class Bench:
    """A checkpoint, its copy with outliers, held-out tokens and what was measured."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.device = choose_device(options.device)
        self.folders = {False: options.checkpoint, True: work / "outliers"}
        tokenizer = load_tokenizer(options.checkpoint)
        held_out = read_documents(options.evaluation, part="held_out")
        self.tokens = windows(
            tokenizer, held_out, windows=options.windows, length=options.length
        ).ids
        self.original = self.stream(open_source(options.checkpoint))

    def stream(self, source: Source) -> FinalStates:
        """The held-out tokens after all blocks of a checkpoint."""
        model = StreamedModel(source)
        (stream,) = run_blocks(
            [model],
            self.tokens,
            device=self.device,
            dtype=torch.float32,
            batch=self.options.batch,
        )
        return stream

    def measure(self, row: Row) -> dict[str, Any]:
        """One row: per window the mean negative log-likelihood and KL to the original."""
        folder, result = self.folders[row.outliers], {}
        if row.outliers and not folder.exists():
            plant_outliers(self.options.checkpoint, folder)
        if row.passes:
            output = self.work / "out"
            shutil.rmtree(output, ignore_errors=True)
            result = self.compile(row, folder, output)
            folder = output
        source = open_source(folder)
        started = time.perf_counter()
        counted = torch.ones_like(self.tokens[:, 1:], dtype=torch.bool)
        nll, _, kl, top1 = token_scores([self.stream(source), self.original], self.tokens, counted)
        return {
            **result,
            "nll": nll.mean(1).tolist(),
            "kl": kl.mean(1).tolist(),
            "top1": float(top1.mean()),
            "evaluation_seconds": time.perf_counter() - started,
        }

    def compile(self, row: Row, model: Path, output: Path) -> dict[str, Any]:
        """Run the row's recipe; its size and the mean error its passes report."""
        started = time.perf_counter()
        options = self.options
        data = {
            "model": str(model),
            "output": str(output),
            "calibration": {
                "data": options.calibration,
                "samples": options.samples,
                "length": options.length,
            },
            "passes": list(row.passes),
            "format": row.format,
            "untie": row.untie,
        }
        compiled = compile_checkpoint(prepare(make_recipe(data), device=self.device))
        errors: dict[str, list[float]] = {}
        for unit in compiled.units:
            for found in unit.rows:
                if found.get("error") is not None:
                    errors.setdefault(str(found.get("error_of", "output")), []).append(
                        float(found["error"])
                    )
        return {
            "bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
            "errors": {kind: sum(values) / len(values) for kind, values in errors.items()},
            "seconds": time.perf_counter() - started,
        }


def plant_outliers(checkpoint: Path, folder: Path) -> None:
    """A copy of a checkpoint whose norms before linears are multiplied by FACTOR in CHANNELS
    channels of each block, with the columns of what reads them divided by it: exactly equivalent,
    since FACTOR is a power of two."""
    source = open_source(checkpoint)
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, Tensor] = {}
    for unit in source.layout.units:
        found = dict(source.read_unit(unit).tensors)
        for site_fold in unit.folds:
            if unit.kind == "block" and site_fold.kind == "norm":
                width = found[f"{site_fold.source}.weight"].shape[0]
                scales = torch.ones(width)
                scales[torch.randperm(width, generator=generator)[:CHANNELS]] = 1 / FACTOR
                found |= fold(found, site_fold, unit, scales)
        tensors |= found
    shutil.copytree(
        checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*", "manifest.json")
    )
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def estimate(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over windows."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def show(row: Row, found: dict[str, Any], baseline: list[float] | None) -> str:
    """A line of the table."""
    if "skipped" in found:
        return f"{row.name:38} skipped: {found['skipped']}"
    ratio = ""
    if baseline is not None:
        mean, error = estimate([a - b for a, b in zip(found["nll"], baseline, strict=True)])
        ratio = f"{math.exp(mean):8.4f} ± {math.exp(mean) * error:.4f}"
    kl, kl_error = estimate(found["kl"])
    errors = ", ".join(f"{kind} {value:.2e}" for kind, value in found.get("errors", {}).items())
    size = f"{found['bytes'] / 1e6:7.1f}" if "bytes" in found else " " * 7
    return (
        f"{row.name:38} {math.exp(estimate(found['nll'])[0]):9.3f} {ratio:>17} "
        f"{kl:8.4f} ± {kl_error:.4f} {found['top1']:6.1%} {size} "
        f"{found.get('seconds', 0):5.1f} {found['evaluation_seconds']:5.1f}  {errors}"
    )


def compare(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every claim whose rows were measured: difference in nats of the second from the first."""
    results = []
    for better, worse in CLAIMS:
        a, b = found.get(better, {}), found.get(worse, {})
        if "nll" not in a or "nll" not in b:
            continue
        mean, error = estimate([y - x for x, y in zip(a["nll"], b["nll"], strict=True)])
        kl, kl_error = estimate([y - x for x, y in zip(a["kl"], b["kl"], strict=True)])

        def verdict(value: float, error: float) -> str:
            return "none" if abs(value) < 2 * error else ("better" if value > 0 else "WORSE")

        results.append(
            {
                "better": better,
                "worse": worse,
                "nll": [mean, error, verdict(mean, error)],
                "kl": [kl, kl_error, verdict(kl, kl_error)],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose names hold one of")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--calibration", default="bundled/prose", help="as in a recipe, or a file of text"
    )
    parser.add_argument(
        "--evaluation", default="bundled/fiction", help="as in a recipe, or a file of text"
    )
    parser.add_argument("--samples", type=int, default=128, help="rows of calibration tokens")
    parser.add_argument("--windows", type=int, default=65, help="rows of held-out tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens of each row")
    parser.add_argument("--batch", type=int, default=16, help="rows evaluated at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=330, help="start no row after this long")
    parser.add_argument("--json", type=Path, help="rows are kept here, and resumed from")
    options = parser.parse_args()
    started = time.perf_counter()
    settings = {
        key: str(value)
        for key, value in vars(options).items()
        if key not in ("json", "rows", "seconds", "batch", "checkpoint")
    }
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    found: dict[str, Any] = kept.get("rows", {}) if kept.get("settings") == settings else {}
    wanted = [
        row
        for row in rows_of(options.group_size)
        if not options.rows
        or row.name == "baseline"
        or any(part in row.name for part in options.rows)
    ]
    print(
        f"{'row':38} {'ppl':>9} {'ratio to baseline':>17} {'KL':>17} {'top-1':>6} {'MB':>7} "
        f"{'run s':>5} {'eval':>5}  mean relative error",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = None
        for row in wanted:
            passes = json.dumps(row.passes)
            old = found.get(row.name)
            if old is None or old.get("passes") != passes or "skipped" in old:
                if time.perf_counter() - started > options.seconds:
                    print(f"{row.name:38} not started: run again to continue", flush=True)
                    continue
                bench = bench or Bench(options, Path(folder))
                try:
                    found[row.name] = {**bench.measure(row), "passes": passes}
                except Problems as error:
                    reason = error.problems[0].message
                    found[row.name] = {"skipped": reason, "passes": passes}
                except CompressError as error:
                    found[row.name] = {"skipped": error.message, "passes": passes}
                except RuntimeError as error:  # one row's failure is no reason to lose the others
                    traceback.print_exc()
                    reason = f"failed: {str(error).splitlines()[0]}"
                    found[row.name] = {"skipped": reason, "passes": passes}
                if options.json:
                    data = {"settings": settings, "rows": found, "comparisons": compare(found)}
                    options.json.write_text(json.dumps(data, indent=1))
            baseline = found["baseline"]["nll"] if row.name != "baseline" else None
            print(show(row, found[row.name], baseline), flush=True)
    print(
        f"\n{options.windows * (options.length - 1)} targets; differences in nats per token, "
        "second row less first (positive: the first is better)"
    )
    for entry in compare(found):
        (nll, error, says), (kl, kl_error, kl_says) = entry["nll"], entry["kl"]
        print(
            f"{entry['better']:38} against {entry['worse']:28} nll {nll:+.4f} ± {error:.4f} "
            f"{says:6}  KL {kl:+.4f} ± {kl_error:.4f} {kl_says}"
        )


if __name__ == "__main__":
    main()
