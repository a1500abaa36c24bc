"""The verdict by one process and by several, torchrun around the command, and a killed rank.

    python scripts/bench/verdicts.py --gpus 2 [--layers 12] [--scratch FOLDER]
    python scripts/bench/verdicts.py --gpus 2 --device cpu --tiny          # whether it works

Random weights of a 7B Llama's shape, by AWQ. Prints a Markdown row for each of: torchrun around
`compress run` and the same by one process; rounding without data by one and by several; `compress
verify --against` and `compress eval` (16 windows of 512 tokens, beside the original) by one process
and by several, with the seconds from the begin of the stage to the end of the process, and whether
the reports are the same but for times; a run of which the last rank is killed after the first
block, and what continues it with one process. Ends with 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ranks import AWQ, HERE, write_text

MINUTE = 60.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its code, what it printed on stdout, seconds in all and from the begin
    of the stage."""

    code: int
    stdout: str
    whole: float
    stage: float


def ran(command: list[str], stage: str, *, kill_after: str | None = None) -> Ended:
    """Run a command that says what it does in JSON lines.

    kill_after  unit after which one of its processes is killed
    """
    began = time.time()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        found: list[str] = []
        reading = threading.Thread(target=_collect, args=(process.stdout, found))
        reading.start()
        entered = began
        for line in process.stderr:
            if line[:1] != "{":
                continue
            event = json.loads(line)
            if event["event"] == stage:
                entered = event["time"]
            if kill_after is not None and event.get("unit") == kill_after:
                tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                os.kill(int(tasks.split()[-1]), signal.SIGKILL)
                entered, kill_after = time.time(), None
        code = process.wait()
        reading.join()
    now = time.time()
    return Ended(code, "".join(found), now - began, now - entered)


def _collect(stream: IO[str], found: list[str]) -> None:
    found += stream


def without_times(text: str) -> Any:
    """A report of verify or eval."""
    report = json.loads(text)
    report.pop("seconds", None)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it")
    parser.add_argument("--scratch", type=Path, help="folder for the model; default: temporary")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    wrong: list[str] = []

    def row(what: str, processes: int, ended: Ended, note: str, *, right: bool) -> None:
        print(
            f"| {what} | {processes} | {ended.stage:.1f} | {ended.whole:.1f} | {ended.code} "
            f"| {note if right else 'WRONG: not ' + note} |",
            flush=True,
        )
        if not right:
            wrong.append(f"{what}: {ended.stdout[-2000:]}")

    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        scratch = Path(temporary)
        model, text = scratch / "model", scratch / "text.txt"
        write_text(text)
        make = [sys.executable, str(HERE / "make_random_model.py"), str(model)]
        make += ["--shape", "wide" if options.tiny else "7b", "--device", options.device]
        make += ["--layers", "3" if options.tiny else str(options.layers)]
        subprocess.run(make, check=True, stdout=sys.stderr)
        data = {"data": str(text), "samples": 12 if options.tiny else 32}
        asked = {
            "model": str(model),
            "calibration": {**data, "length": 64 if options.tiny else 512},
        }
        recipe = scratch / "recipe.yaml"
        recipe.write_text(json.dumps({**asked, "passes": [AWQ], "verify": False}))
        shared = ["--device", options.device, "--json", "--log-format", "json"]
        compress = [sys.executable, "-m", "compressor"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={options.gpus}", "-m", "compressor"]
        run, folders = ["run", str(recipe), *shared, "-o"], {}
        print("| what | processes | seconds | with start | code | |\n|---|---|---|---|---|---|")

        def written(name: str) -> bytes:
            path = folders[name] / "manifest.json"
            return path.read_bytes() if path.is_file() else b""

        folders |= {name: scratch / name for name in ("one", "several", "killed", "free")}
        plain = scratch / "plain.yaml"
        step = {"rtn": {"bits": 4, "group_size": 128}}
        plain.write_text(json.dumps({"model": str(model), "passes": [step], "verify": False}))
        one = ran([*compress, *run, str(folders["one"])], "compress")
        row("run", 1, one, "done", right=one.code == 0)
        several = ran([*torchrun, *run, str(folders["several"])], "compress")
        same = several.code == 0 and written("several") == written("one")
        row("torchrun", options.gpus, several, "same bytes", right=same)
        free: list[bytes] = []
        for gpus in (1, options.gpus):
            asked_for = ["run", str(plain), *shared, "-o", str(folders["free"])]
            found = ran([*compress, *asked_for, "--gpus", str(gpus)], "compress")
            free.append(written("free"))
            same = found.code == 0 and free[-1] == free[0]
            row("run without data", gpus, found, "same bytes", right=same)
            shutil.rmtree(folders["free"], ignore_errors=True)
        checkpoint = [str(folders["one"]), "--against", str(model), *shared]
        windows = ["--text", str(text), "--windows", "16", "--length", "512"]
        for stage, command in (
            ("verify", ["verify", *checkpoint]),
            ("evaluate", ["eval", *checkpoint, *(windows if not options.tiny else windows[:4])]),
        ):
            reports = []
            for gpus in (1, options.gpus):
                found = ran([*compress, *command, "--gpus", str(gpus)], stage)
                reports.append(without_times(found.stdout))
                same = found.code == 0 and reports[-1] == reports[0]
                row(stage, gpus, found, "same report", right=same)
        killed = [*compress, *run, str(folders["killed"])]
        lost = ran([*killed, "--gpus", str(options.gpus)], "", kill_after="model.layers.0")
        right = lost.code == 3 and lost.stage < MINUTE
        row("a rank killed", options.gpus, lost, "ended with 3 within a minute", right=right)
        on = ran(killed, "compress")
        same = on.code == 0 and written("killed") == written("one")
        row("continued", 1, on, "same bytes", right=same)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
