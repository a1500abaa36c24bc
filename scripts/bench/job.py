"""Time and memory of a whole `compress run`, from checkpoint on disk to packed checkpoint on disk.

    python scripts/bench/job.py MODEL [--device cuda] [--samples 128] [--length 512]
        [--group-size 128] [--cold] [--runs 2] [--set KEY=VALUE ...]

The whole process counts, imports and kernel compilation included; Triton's cache is a fresh folder
for each run, so nothing is compiled beforehand. Without --cold the model's files are read once
before the clock starts. Verification and evaluation are off. Prints one JSON line for each run:
wall seconds, peak resident memory of the process, peak device memory as the driver sees it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RECIPE = """
model: {model}
output: {output}
calibration: {{data: bundled, samples: {samples}, length: {length}}}
passes:
  - awq: {{bits: 4, group_size: {group_size}, symmetric: false}}
verify: false
"""


def settle(model: Path, *, cold: bool) -> None:
    """Bring the model's files into the page cache, or out of it, with nothing left to write."""
    os.sync()
    for path in model.glob("*.safetensors"):
        with path.open("rb") as handle:
            if cold:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while handle.read(1 << 24):
                    pass


class DeviceMemory(threading.Thread):
    """Asks the driver for the device's used memory, above what was used before, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()
        self.before = self._used()

    @staticmethod
    def _used() -> int:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        found = subprocess.run(query, capture_output=True, text=True)
        return int(found.stdout.split()[0]) << 20 if found.returncode == 0 else 0

    def run(self) -> None:
        while not self.done.wait(0.2):
            self.peak = max(self.peak, self._used() - self.before)


def run(args: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """One run in a process of its own."""
    output = scratch / "out"
    shutil.rmtree(output, ignore_errors=True)
    recipe = scratch / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            model=args.model,
            output=output,
            samples=args.samples,
            length=args.length,
            group_size=args.group_size,
        )
    )
    settle(args.model, cold=args.cold)
    overrides = [part for value in args.set for part in ("--set", value)]
    command = [sys.executable, "-m", "compressor", "run", str(recipe), "--device", args.device]
    cache = tempfile.mkdtemp(dir=scratch)
    watcher = DeviceMemory() if args.device != "cpu" else None
    if watcher:
        watcher.start()
    began, clock = time.perf_counter(), time.time()
    process = subprocess.Popen(
        [*command, *overrides, "--json", "--log-format", "json"],
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        stderr=(scratch / "log.jsonl").open("w"),
        text=True,
    )
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if watcher:
        watcher.done.set()
        watcher.join()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the run failed:\n{told}\n{(scratch / 'log.jsonl').read_text()[-3000:]}")
    result = json.loads(told)
    events = [json.loads(line) for line in (scratch / "log.jsonl").read_text().splitlines()]
    units = [event["time"] - clock for event in events if event["event"] == "unit"]
    return {
        "seconds": round(seconds, 2),
        "first_unit_at": round(units[0], 2),
        "second_unit_at": round(units[1], 2),
        "last_unit_at": round(units[-1], 2),
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "peak_device_gb": round(watcher.peak / 1e9, 2) if watcher else 0.0,
        "peak_allocated_gb": round(result["peak_device_bytes"] / 1e9, 2),
        "cold": args.cold,
        "output_gb": round(result["output_bytes"] / 1e9, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--scratch", type=Path, help="folder for the output; default: temporary")
    args = parser.parse_args()
    if args.scratch:
        args.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for _ in range(args.runs):
            print(json.dumps(run(args, Path(scratch))), flush=True)
        if os.environ.get("OUT"):
            shutil.copy(Path(scratch) / "log.jsonl", Path(os.environ["OUT"]) / "job-log.jsonl")


if __name__ == "__main__":
    main()
