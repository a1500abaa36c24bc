"""Peak memory of a run on models of few and of many equal layers, beside what `plan` said.

    python scripts/measure/run.py memory [--shape wide] [--layers 4 16] [--delta]

With --delta it is a fine-tune as signs on top of its base, of which one unit each may be in memory.
Peak resident size must not grow with depth, and must be within 25% of the plan.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from variant import Bench, Figures, Variant

MAKE = Path(__file__).resolve().parents[2] / "make_random_model.py"
SLACK, GROWTH = 0.25, 0.05
PASSES = "[awq: {bits: 4, group_size: 128, symmetric: false, grid: 5}]"


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(device="cpu")
    parser.add_argument("--shape", default="wide", help="as of make_random_model.py")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--delta", action="store_true", help="BitDelta in place of AWQ")


def printed(*arguments: str) -> Any:
    """The JSON that a command prints, run in a process of its own."""
    command = [sys.executable, "-m", "compressor", *arguments, "--json"]
    environment = {"OMP_NUM_THREADS": "2", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def measure(bench: Bench, layers: int) -> Figures:
    """Make a model (and its base), plan and run it; bytes."""
    options, work, device = bench.options, bench.work, str(bench.device)
    model, base = work / f"{layers}", work / f"{layers}-base"
    for seed, folder in enumerate([model, base] if options.delta else [model]):
        make = [sys.executable, str(MAKE), str(folder), "--layers", str(layers)]
        make += ["--shape", options.shape, "--device", device, "--seed", str(seed)]
        subprocess.run(make, check=True)
    text, recipe = work / "text.txt", work / f"{layers}.yaml"
    text.write_text("What is said here has no meaning but fills rows of tokens. " * 400)
    passes = f"[bitdelta: {{base: {base}, distill: layer}}]" if options.delta else PASSES
    recipe.write_text(
        f"model: {model}\noutput: {work / f'out-{layers}'}\nverify: false\npasses: {passes}\n"
        f"calibration: {{data: {text}, samples: 8, length: 128}}\n"
    )
    planned = printed("plan", str(recipe), "--device", device)["estimates"]
    found = printed("run", str(recipe), "--device", device)
    return {
        f"{kind}{what}": part[f"{peak}{kind}_bytes"]
        for kind in ("host", "device")
        for what, part, peak in (("", found, "peak_"), (" planned", planned, ""))
    }


def judge(rows: dict[str, Figures]) -> Iterator[str]:
    """What does not hold."""
    for kind in ("host", "device"):
        for name, row in rows.items():
            planned, peak = row[f"{kind} planned"], row[kind]
            if planned and abs(peak / planned - 1) > SLACK:
                yield f"{kind}, {name}: {peak / planned:.2f} of the plan"
        first, *_, last = (row[kind] for row in [*rows.values()] * 2)
        if first and last > first * (1 + GROWTH):
            yield f"{kind} grew {last / first:.2f} times with depth"


def variants(bench: Bench) -> Iterator[Variant]:
    for layers in bench.options.layers:
        yield Variant(f"{layers} layers", lambda layers=layers: measure(bench, layers))
