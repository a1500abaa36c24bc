"""Time and memory of whole `compress run`s with AWQ, from checkpoint on disk to packed checkpoint.

    python scripts/bench/job.py MODEL --runs 4
    python scripts/bench/job.py MODEL --package OLD --package NEW --runs 3
    python scripts/bench/job.py SMOLLM2 --device cpu --threads 2 --samples 16 --length 256 \\
        --group-size 64 --without-clipping --peer PEER/bin/python

A whole process counts, imports and kernel compilation included; Triton's cache is a fresh folder
for each run. Without --cold the model's files are read once before the clock starts. Verification
and evaluation (8 x 512 tokens, beside the original) are on with --judged alone. Each --package is a
folder that holds `compressor` (an unpacked wheel, or a checkout with `kernels` and `calibration`);
without one it is what Python finds. They take turns.
PEER is an environment with `pip install llmcompressor`, whose AWQ searches no clipping. A line of
JSON for each run, then a Markdown table of minimum and median; with OUT set, the last log too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEXT = HERE.parents[1] / "calibration/compressor_calibration/text/calibration/prose.txt"


@dataclass(frozen=True)
class Way:
    """One command that is timed; `package` goes before all else on Python's path."""

    name: str
    command: list[str]
    package: Path | None = None
    ours: bool = True


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


def settle(model: Path, *, cold: bool) -> None:
    """Bring the model's files into the page cache, or out of it, with nothing left to write."""
    os.sync()
    for path in model.glob("*.safetensors"):
        with path.open("rb") as handle:
            if cold:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while handle.read(1 << 24):
                    pass


def timed(way: Way, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    shutil.rmtree(scratch / "out", ignore_errors=True)
    settle(options.model, cold=options.cold)
    environment = {**os.environ, "TRITON_CACHE_DIR": tempfile.mkdtemp(dir=scratch)}
    environment["TQDM_DISABLE"] = "1"
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    if way.package:
        inside = [way.package, way.package / "kernels", way.package / "calibration"]
        path = [str(folder.resolve()) for folder in inside if folder.is_dir()]
        environment["PYTHONPATH"] = os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])
    watcher = DeviceMemory() if options.device != "cpu" else None
    if watcher:
        watcher.start()
    log = scratch / "log.jsonl"
    began, clock = time.perf_counter(), time.time()
    with log.open("w") as stderr:
        process = subprocess.Popen(
            way.command, env=environment, stdout=subprocess.PIPE, stderr=stderr,
            text=True,
        )  # fmt: skip
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if watcher:
        watcher.done.set()
        watcher.join()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{way.name} failed:\n{told}\n{log.read_text()[-3000:]}")
    found: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "peak_device_gb": round(watcher.peak / 1e9, 2) if watcher else 0.0,
    }
    if not way.ours:
        return found
    result = json.loads(told)
    events = [json.loads(line) for line in log.read_text().splitlines() if line[:1] == "{"]
    done = [event for event in events if event["event"] == "unit"]
    units = [round(e["time"] - clock, 2) for e in done if e["stage"] == done[0]["stage"]]
    return {
        **found,
        "first_unit_at": units[0],
        "second_unit_at": units[1],
        "last_unit_at": units[-1],
        "peak_allocated_gb": round(result["peak_device_bytes"] / 1e9, 2),
        "output_gb": round(result["output_bytes"] / 1e9, 3),
        **{
            f"{event['stage']}_s": round(event["seconds"], 2)
            for event in events
            if event["event"] == "stage done" and event["stage"] in ("verify", "evaluate")
        },
    }


def ways(options: argparse.Namespace, scratch: Path) -> list[Way]:
    """All that take turns."""
    found = []
    for package in options.package or [None]:
        for clip in (True, False) if options.without_clipping else (True,):
            awq = {"bits": 4, "group_size": options.group_size, "symmetric": False, "clip": clip}
            calibration = {"data": options.data, "samples": options.samples}
            recipe = scratch / f"{'' if clip else 'no-'}clip.yaml"
            text: dict[str, Any] = {
                "model": str(options.model.resolve()),
                "output": str(scratch / "out"),
                "calibration": {**calibration, "length": options.length},
                "passes": [{"awq": awq}],
                "verify": options.judged,
            }
            if options.judged:
                text["evaluate"] = {"data": options.data, "windows": 8, "length": 512}
                text["evaluate"]["force"] = True  # the texts need not differ to be timed
            recipe.write_text(json.dumps(text))
            # -P: the working folder does not come before what is asked for.
            command = [sys.executable, *(["-P"] if package else []), "-m", "compressor", "run"]
            command += [str(recipe), "--json", "--device", options.device, "--log-format", "json"]
            command += [part for value in options.set for part in ("--set", value)]
            name = f"{package or 'ours'}{'' if clip else ', without clipping'}"
            found.append(Way(name, command, package))
    if options.peer:
        shape = [str(n) for n in (options.samples, options.length, options.group_size)]
        command = [options.peer, str(HERE / "peer_awq.py"), str(options.model.resolve())]
        command += [str(scratch / "out"), str(TEXT), *shape]
        found.append(Way("llm-compressor", command, ours=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--package", type=Path, action="append", help="a version to time")
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--without-clipping", action="store_true", help="also without its search")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="of PyTorch on a processor")
    parser.add_argument("--data", default="bundled", help="as in a recipe")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--judged", action="store_true", help="with verification and evaluation")
    parser.add_argument("--cold", action="store_true", help="files not in the page cache")
    parser.add_argument("--runs", type=int, default=1, help="of each")
    parser.add_argument("--set", action="append", default=[], help="as for compress run")
    parser.add_argument("--scratch", type=Path, help="folder for the output; default: temporary")
    options = parser.parse_args()
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        for _ in range(options.runs):
            for way in ways(options, scratch):
                rows.setdefault(way.name, []).append(row := timed(way, options, scratch))
                print(json.dumps({"what": way.name, **row, "cold": options.cold}), flush=True)
        if os.environ.get("OUT"):
            shutil.copy(scratch / "log.jsonl", Path(os.environ["OUT"]) / "job-log.jsonl")
    keys = list(next(iter(rows.values()))[0])
    print(
        f"\n| minimum, median of {options.runs} | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 1)}"
    )
    for name, found in rows.items():
        values = [[row[key] for row in found if key in row] for key in keys]
        shown = [f"{min(v)}, {statistics.median(v):g}" if v else "" for v in values]
        print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
