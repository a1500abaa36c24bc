"""Until a run's first block begins, on this machine: several versions in turns, in one call.

    python scripts/bench/startup.py MODEL --package OLD --package NEW [--runs 3]

Each run is a whole `compress run` of AWQ (128 × 512 tokens), ended as soon as its first unit, the
embedding, is done: then the first block begins. A --package is a folder as `job.py` takes it; say
`git archive COMMIT | tar x -C OLD`. Imports are those of the environment that Python finds, byte
code is compiled beforehand, Triton's cache is a fresh folder each time and the model's files are in
the page cache. A line of JSON for each run, then a Markdown table with the median.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from job import settle


def first_block(package: Path | None, model: Path, device: str) -> dict[str, float]:
    """Seconds until the embedding is done, and until the run says that it begins."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        recipe = scratch / "recipe.yaml"
        text = {
            "model": str(model.resolve()),
            "output": str(scratch / "out"),
            "calibration": {"data": "bundled", "samples": 128, "length": 512},
            "passes": [{"awq": {"bits": 4, "group_size": 128, "symmetric": False}}],
            "verify": False,
        }
        recipe.write_text(json.dumps(text))
        environment = {**os.environ, "TRITON_CACHE_DIR": str(scratch / "triton")}
        if package:
            inside = [package, package / "kernels", package / "calibration"]
            path = [str(part.resolve()) for part in inside if part.is_dir()]
            environment["PYTHONPATH"] = os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])
        # -P: the working folder does not come before what is asked for.
        command = [sys.executable, *(["-P"] if package else []), "-m", "compressor", "run"]
        command += [str(recipe), "--device", device, "--log-format", "json"]
        found: dict[str, float] = {}
        began = time.time()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            event = json.loads(line) if line[:1] == "{" else {}
            if event.get("event") == "compress":
                found["announced_at"] = round(event["time"] - began, 2)
            if event.get("event") == "unit":
                found["first_block_at"] = round(event["time"] - began, 2)
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--package", type=Path, action="append", help="a version to time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=3, help="of each")
    options = parser.parse_args()
    packages = options.package or [None]
    for package in options.package or []:
        for part in ("compressor", "kernels", "calibration"):
            compileall.compile_dir(package / part, quiet=2, workers=0)
    settle(options.model, cold=False)
    rows: dict[str, list[float]] = {}
    for _ in range(options.runs):
        for package in packages:
            name = str(package or "ours")
            found = first_block(package, options.model, options.device)
            rows.setdefault(name, []).append(found["first_block_at"])
            print(json.dumps({"what": name, **found}), flush=True)
    print(f"\n| until the first block, median of {options.runs} | seconds |\n|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):g} |")


if __name__ == "__main__":
    main()
