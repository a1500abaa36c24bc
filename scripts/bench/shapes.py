"""Recipes on random weights of large shapes: seconds of a block and memory, on one GPU or several.

    python scripts/bench/shapes.py [--case llama-3-70b ...] [--gpus 1 2] [--scratch FOLDER]
    python scripts/bench/shapes.py --gpus 1 2 --device cpu --tiny          # whether it works

A case is some blocks of a model and a recipe. The first block is left out, where there are others:
it waits for kernels to be compiled. A line of JSON for each run, and one Markdown table: seconds of
a block, from the end of the first to the end of the last; for how many GPUs how many times as fast
as the first of --gpus and its share of them, and whether all tensors are the same bytes (manifests
also say how many threads a process had, which ranks share); the largest memory on the leading GPU
and of the process, each with what was planned; and blocks of the whole model times the seconds of
one. A folder in memory (/dev/shm) is quickest.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_random_model import SHAPES, Config, block, smaller, write
from tables import markdown
from whole import AWQ, run

GPTQ = {"gptq": {"bits": 4, "group_size": 128, "correction": 0.5, "scales": "search"}}
PLAIN_GPTQ = {"gptq": {"bits": 4, "group_size": 128, "correction": 0.0, "scales": "range"}}
LEARNED = {"reconstruct": {"bits": 4, "group_size": 128, "preset": "fast"}}


@dataclass(frozen=True)
class Case:
    """A shape of `make_random_model.py`, how many blocks of it, what is done to it."""

    shape: str
    layers: int
    step: dict[str, Any]
    samples: int
    length: int


LARGE = ("llama-3-70b", "llama-3-405b", "mixtral-8x22b", "qwen3-235b-a22b", "deepseek-v3")
CASES = {
    "awq": Case("7b", 9, AWQ, 128, 512),
    "awq-long": Case("7b", 5, AWQ, 512, 2048),
    "gptq-long": Case("7b", 5, PLAIN_GPTQ, 512, 2048),
    "gptq-beside-long": Case("7b", 3, GPTQ, 512, 2048),
    "reconstruct-long": Case("7b", 3, LEARNED, 512, 2048),
    "gptq-beside": Case("7b", 2, GPTQ, 64, 512),
    "reconstruct": Case("7b", 2, LEARNED, 64, 512),
    "moe-awq": Case("30b-a3b", 4, AWQ, 128, 512),
    **{name: Case(name, 3, AWQ, 128, 512) for name in LARGE},
}


def write_text(path: Path) -> None:
    """Words drawn at random, as many bytes as the largest case has tokens and more."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(2000)]
    lines = (" ".join(draw.choices(words, k=400)) for _ in range(900))
    path.write_text("\n\n".join(lines))


def model_of(case: Case, options: Namespace, scratch: Path) -> Path:
    """Its random weights, written once; one block where main memory does not hold eight."""
    config: Config = SHAPES[case.shape]
    if options.tiny:
        small = {"7b": "wide", "30b-a3b": "tiny-moe"}.get(case.shape)
        config = SHAPES[small] if small else smaller(config)
    if "first_k_dense_replace" in config:
        config = {**config, "first_k_dense_replace": 0}
    layers = min(case.layers, 4) if options.tiny else case.layers
    size = 2 * sum(torch.Size(shape).numel() for shape in block(config, 0).values())
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * size:
        layers = 1
    folder = scratch / f"{case.shape}-{layers}"
    if not folder.exists():
        write(folder, config, layers=layers, uneven=options.uneven)
    return folder


def timed(case: Case, gpus: int, options: Namespace, scratch: Path) -> dict[str, Any]:
    """One run, with the hashes of its tensors."""
    samples, length = (24, 64) if options.tiny else (case.samples, case.length)
    recipe = {
        "model": str(model_of(case, options, scratch)),
        "calibration": {"data": str(scratch / "text.txt"), "samples": samples, "length": length},
        "passes": [case.step],
        "verify": False,
        "report": False,
    }
    limit = ["--device-memory", options.device_memory] if options.device_memory else []
    ran = run(recipe, scratch, "--gpus", str(gpus), *limit, device=options.device)
    said = [event for event in ran.events if event["event"] == "unit"]
    # The embedding comes first and the head last.
    blocks = said[1:-1]
    took = blocks[-1]["time"] - blocks[0]["time"]
    each = took / (len(blocks) - 1) if len(blocks) > 1 else blocks[0]["seconds"]
    found = ran.result
    return {
        "tokens": samples * length,
        "whole_s": round(ran.seconds, 1),
        "blocks": len(blocks),
        "block_s": round(each, 3),
        **{
            f"{when}{kind}_gb": round(found[f"{when or 'peak_'}{kind}_bytes"] / 1e9, 2)
            for kind in ("device", "host")
            for when in ("", "planned_")
        },
        "model_s": round(each * SHAPES[case.shape]["num_hidden_layers"]),
        "hashes": json.loads((scratch / "out" / "manifest.json").read_text("utf-8"))["tensors"],
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-memory", help="of each rank; experts may be spread over them")
    parser.add_argument("--uneven", action="store_true", help="channels of unlike sizes")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it")
    parser.add_argument("--scratch", type=Path, help="folder for models; default: temporary")
    options = parser.parse_args()
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    keys: list[str] = []
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        scratch = Path(temporary).resolve()
        write_text(scratch / "text.txt")
        shape = ""
        for name in options.case:
            if CASES[name].shape != shape:  # models of another shape are not needed any more
                for folder in scratch.glob(f"{shape or ' '}-*"):
                    shutil.rmtree(folder)
                shape = CASES[name].shape
            one: dict[str, Any] = {}
            for gpus in options.gpus:
                try:
                    found = timed(CASES[name], gpus, options, scratch)
                except SystemExit as failed:
                    print(f"{name} on {gpus}: {failed}", flush=True)
                    continue
                one = one or dict(found)
                same = found.pop("hashes") == one["hashes"]
                times = one["block_s"] / max(found["block_s"], 1e-9)
                beside = {"times": round(times, 2), "efficiency": f"{times / gpus:.0%}"}
                row = {"case": name, "gpus": gpus, **found, **beside, "same_bytes": same}
                print(json.dumps(row), flush=True)
                keys = list(row)
                rows.append(list(row.values()))
    print(f"\n{markdown(keys, rows)}")


if __name__ == "__main__":
    main()
