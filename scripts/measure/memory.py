"""Peak memory of a run on models of few and of many equal layers, beside what `plan` said.

    python scripts/measure/memory.py WORK [--shape wide] [--layers 4 16] [--device cpu] [--delta]

With --delta it is a fine-tune as signs on top of its base, of which one unit each may be in memory.

Peak resident size must not grow with depth, and must be within 25% of the plan. WORK is a new
folder for the random models and their outputs. Exit code 1 where either does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
SLACK = 0.25
GROWTH = 0.05
PASSES = "[awq: {bits: 4, group_size: 128, symmetric: false, grid: 5}]"


def compress(*arguments: str) -> dict[str, Any]:
    """The JSON that a command prints, run in a process of its own."""
    command = [sys.executable, "-m", "compressor", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(
    work: Path, *, layers: int, shape: str, device: str, delta: bool = False
) -> dict[str, Any]:
    """Make a model (and its base), plan and run it; one row of the table, in bytes."""
    model, base = work / f"{shape}-{layers}", work / f"{shape}-{layers}-base"
    for seed, folder in enumerate([model, base] if delta else [model]):
        make = [sys.executable, str(SCRIPTS / "make_random_model.py"), str(folder)]
        options = ["--layers", str(layers), "--shape", shape, "--device", device]
        subprocess.run([*make, *options, "--seed", str(seed)], check=True)
    passes = f"[bitdelta: {{base: {base}, distill: layer}}]" if delta else PASSES
    text = work / "text.txt"
    text.write_text("What is said here has no meaning but fills rows of tokens. " * 400)
    recipe = work / f"{layers}.yaml"
    recipe.write_text(
        f"model: {model}\noutput: {work / f'out-{layers}'}\nverify: false\npasses: {passes}\n"
        f"calibration: {{data: {text}, samples: 8, length: 128}}\n"
    )
    estimates = compress("plan", str(recipe), "--device", device)["estimates"]
    found = compress("run", str(recipe), "--device", device)
    return {
        "layers": layers,
        "host": found["peak_host_bytes"],
        "host_planned": estimates["host_bytes"],
        "device": found["peak_device_bytes"],
        "device_planned": estimates["device_bytes"],
    }


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """What does not hold."""
    found = []
    for kind in ("host", "device"):
        for row in rows:
            planned, peak = row[f"{kind}_planned"], row[kind]
            if planned and abs(peak / planned - 1) > SLACK:
                found.append(f"{kind}, {row['layers']} layers: {peak / planned:.2f} of the plan")
        first, last = rows[0][kind], rows[-1][kind]
        if first and last > first * (1 + GROWTH):
            found.append(f"{kind} grew {last / first:.2f} times with depth")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", default="wide")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--delta", action="store_true", help="BitDelta in place of AWQ")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    rows = [
        measure(
            options.work,
            layers=layers,
            shape=options.shape,
            device=options.device,
            delta=options.delta,
        )
        for layers in options.layers
    ]
    print(f"{'layers':>6} {'host MB':>8} {'planned':>8} {'device MB':>9} {'planned':>8}")
    for row in rows:
        figures = [row[k] / 1e6 for k in ("host", "host_planned", "device", "device_planned")]
        print("{:>6} {:>8.0f} {:>8.0f} {:>9.0f} {:>8.0f}".format(row["layers"], *figures))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    wrong = problems(rows)
    for line in wrong:
        print(f"FAILED {line}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
