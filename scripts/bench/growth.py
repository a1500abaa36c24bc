"""How the time of a block grows with tokens, layers, width and experts.

    python scripts/bench/growth.py [--device cpu --tiny] [--axis tokens ...] [--scratch FOLDER]

AWQ with scales and clipping searched, of random weights, in one process: a Llama's shape, and
Qwen3-MoE's for experts. One thing changes at a time. The first block is left out, since kernels are
compiled for it. A line of JSON for each run and one Markdown table: seconds a block, from the end
of the first to the end of the last, and by which power of the changed thing they have grown since
the row above.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "bench"), str(HERE.parent)]

import make_random_model  # noqa: E402
import ranks  # noqa: E402

from compressor.plan.recipe import make_recipe  # noqa: E402
from compressor.run.session import compile_checkpoint, prepare  # noqa: E402
from compressor.run.settings import UnitDone  # noqa: E402

LLAMA = {"hidden": 4096, "ff": 11008, "heads": 32, "kv_heads": 32, "vocab": 512}
MOE = {
    **{"hidden": 2048, "ff": 768, "heads": 32, "kv_heads": 4, "head": 128, "vocab": 512},
    **{"experts": 128, "chosen": 8},
}
BASE = {"layers": 3, "samples": 128, "length": 512}
TINY = {
    **{"layers": 3, "samples": 16, "length": 64, "hidden": 128, "ff": 384, "heads": 4},
    **{"kv_heads": 4, "head": 32, "experts": 8, "chosen": 2},
}


def wide(factor: float, shape: Mapping[str, int]) -> dict[str, int]:
    """A shape of other widths."""
    return {name: int(shape[name] * factor) for name in ("hidden", "ff", "heads", "kv_heads")}


def points(axis: str, *, tiny: bool) -> list[tuple[float, dict[str, int]]]:
    """How much there is of what changes, and the shape and tokens of a run."""
    shape = MOE if axis == "experts" else LLAMA
    base = {**BASE, **shape}
    base |= {name: n for name, n in TINY.items() if tiny and name in base}
    if axis == "tokens":
        return [
            (n * base["samples"] * base["length"], base | {"samples": n * base["samples"]})
            for n in (1, 2, 4, 8)
        ]
    if axis == "layers":
        return [(n, base | {"layers": n}) for n in (3, 6, 12)]
    if axis == "width":
        return [(base["hidden"] * f, base | wide(f, base)) for f in (0.5, 1, 2)]
    return [(base["experts"] // n, base | {"experts": base["experts"] // n}) for n in (4, 2, 1)]


def seconds(run: Mapping[str, int], device: torch.device, scratch: Path) -> list[float]:
    """When each block of a run ended."""
    model, output = scratch / "model", scratch / "output"
    for folder in (model, output):
        shutil.rmtree(folder, ignore_errors=True)
    make_random_model.SHAPES["growth"] = {n: v for n, v in run.items() if n not in BASE}
    make_random_model.write(model, shape="growth", layers=run["layers"], device=device.type)
    data = {"data": str(scratch / "text.txt"), "samples": run["samples"], "length": run["length"]}
    recipe = {"model": str(model), "output": str(output), "calibration": data, "verify": False}
    step = {"awq": {"bits": 4, "group_size": 128 if run["hidden"] > 256 else 32}}
    ends: list[float] = []

    def ended(unit: UnitDone) -> None:
        if 0 < unit.index < unit.total - 1:
            ends.append(time.perf_counter())

    prepared = prepare(make_recipe({**recipe, "passes": [step]}), device=device)
    compile_checkpoint(prepared, on_unit=ended)
    return ends


def main() -> None:
    axes = ("tokens", "layers", "width", "experts")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axis", choices=axes, action="append", help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--scratch", type=Path, help="folder for models; default: temporary")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    table = [
        "| what grows | how much | seconds a block | all blocks | power |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        scratch = Path(temporary)
        ranks.write_text(scratch / "text.txt")
        for axis in options.axis or axes:
            before: tuple[float, float] | None = None
            for much, run in points(axis, tiny=options.tiny):
                ends = seconds(run, torch.device(options.device), scratch)
                took = ends[-1] - ends[0]
                block = took / (len(ends) - 1)
                cost = took if axis == "layers" else block
                # The first of the layers is not among those that are timed.
                size = much - 1 if axis == "layers" else much
                power = ""
                if before is not None:
                    power = f"{math.log(cost / before[1]) / math.log(size / before[0]):.2f}"
                before = size, cost
                print(json.dumps({"axis": axis, "much": much, "block_s": block, **run}), flush=True)
                table.append(f"| {axis} | {much:,.0f} | {block:.3f} | {took:.2f} | {power} |")
    print("\n".join(["", *table]))


if __name__ == "__main__":
    main()
