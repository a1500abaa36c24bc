"""Whole runs: a recipe by `compress run` in a process of its own, and what that said of itself."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
AWQ = {"awq": {"bits": 4, "group_size": 128, "symmetric": False}}


@dataclass(frozen=True)
class Ran:
    """How a run went.

    result       the JSON that it printed
    events       what it did, with the time of each
    units        name → seconds from its begin until a unit was done, in order
    seconds      of the whole process;  processor_s, host_gb: what that took
    """

    result: dict[str, Any]
    events: list[dict[str, Any]]
    units: dict[str, float]
    seconds: float
    processor_s: float
    host_gb: float


def run(
    recipe: Mapping[str, Any],
    scratch: Path,
    *options: str,
    device: str,
    environment: Mapping[str, str] | None = None,
) -> Ran:
    """Run a recipe, whose output is `out` in `scratch`; Python is -P where `environment` names
    packages. Raises SystemExit with what it said where it fails."""
    scratch = scratch.resolve()  # the process runs elsewhere
    output, log = scratch / "out", scratch / "log.jsonl"
    shutil.rmtree(output, ignore_errors=True)
    (scratch / "recipe.yaml").write_text(json.dumps({**recipe, "output": str(output)}))
    command = [sys.executable, *(["-P"] if environment else []), "-m", "compressor", "run"]
    command += [str(scratch / "recipe.yaml"), "--json", "--log-format", "json"]
    command += ["--device", device, *options]
    own = {**os.environ, "TQDM_DISABLE": "1", **(environment or {})}
    began, clock = time.perf_counter(), time.time()
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env=own, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = [error["message"] for error in json.loads(told or "{}").get("errors", ())]
        raise SystemExit(f"{'; '.join(said)}\n{' '.join(command)}:\n{log.read_text()[-4000:]}")
    events = [json.loads(line) for line in log.read_text().splitlines() if line[:1] == "{"]
    done = [event for event in events if event["event"] == "unit"]
    return Ran(
        result=json.loads(told),
        events=events,
        units={e["unit"]: e["time"] - clock for e in done if e["stage"] == done[0]["stage"]},
        seconds=seconds,
        processor_s=usage.ru_utime + usage.ru_stime,
        host_gb=usage.ru_maxrss * 1024 / 1e9,
    )
