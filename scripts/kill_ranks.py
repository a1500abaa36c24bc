"""Kills random ranks of a run at random moments, until it has finished, and counts.

    python scripts/kill_ranks.py RECIPE [--kills 50] [--ranks 3] [--signal KILL] [--torchrun]

Each run is `compress run RECIPE --gpus N --device cpu`, or torchrun around it, with a number of
ranks of its own. After a random time a rank is killed (KILL), or stopped until the others notice
(STOP), or the launcher is asked to stop (TERM). Then the launcher and every rank have to end within
a minute, the launcher with 3, or 130 for TERM, torchrun always with 1; with 0 where the run was
done before. A run that finishes has its manifest compared with that of one process, and is begun
again. Nothing hangs, or this says so and ends with 1.
"""

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import psutil

MINUTE = 60.0


def alive(process: psutil.Process) -> bool:
    """Whether it runs still, and is no more than an entry."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def attempt(
    command: list[str], draw: random.Random, number: int, longest: float, *, expected: int
) -> str:
    """One run that loses a rank, or whose launcher gets SIGTERM; how it ended.

    expected  exit code of the launcher then
    """
    launcher = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with contextlib.suppress(psutil.TimeoutExpired):
        launcher.wait(draw.uniform(0, longest))
    ranks = []
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = launcher.children()
    chosen = draw.choice(ranks) if ranks else None
    if number == signal.SIGTERM and launcher.poll() is None:
        chosen = launcher
    if chosen is not None:
        chosen.send_signal(number)
    lost = time.monotonic()
    try:
        _, errors = launcher.communicate(timeout=MINUTE if chosen is not None else 10 * MINUTE)
    except subprocess.TimeoutExpired:
        launcher.kill()
        return "HANGS: the launcher is there after a minute"
    took = time.monotonic() - lost
    if left := [rank for rank in ranks if alive(rank)]:
        for rank in left:
            rank.kill()
        return f"HANGS: {len(left)} ranks are there after the launcher"
    if launcher.returncode == 0:
        return "finished"
    if launcher.returncode != expected:
        return f"WRONG: exit code {launcher.returncode}: {errors.decode()[-300:]}"
    return f"ended with {expected}, {'at once' if took < 20 else 'within a minute'}"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=3, help="at most so many, at least 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "STOP", "TERM"), default="KILL")
    parser.add_argument("--torchrun", action="store_true", help="around the command")
    options = parser.parse_args()
    draw, counts = random.Random(options.seed), Counter[str]()
    program = ["-m", "compressor", "run", str(options.recipe), "--device", "cpu"]
    compress = [sys.executable, *program]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    number = getattr(signal, f"SIG{options.signal}")
    expected = 1 if options.torchrun else 130 if options.signal == "TERM" else 3
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        subprocess.run([*compress, "-o", f"{folder}/one"], check=True, capture_output=True)
        longest = 1.2 * (time.monotonic() - began)
        wanted = Path(folder, "one", "manifest.json").read_bytes()
        output = Path(folder, "several")
        for kill in range(options.kills):
            world = draw.randint(2, options.ranks)
            command = [*compress, "-o", str(output), "--gpus", str(world)]
            if options.torchrun:
                command = [*torchrun, f"--nproc-per-node={world}", *program, "-o", str(output)]
            began = time.monotonic()
            found = attempt(command, draw, number, longest, expected=expected)
            if found == "finished":
                # A kill is to come before the end.
                longest = min(longest, time.monotonic() - began)
                same = (output / "manifest.json").read_bytes() == wanted
                found = "finished, same bytes" if same else "WRONG: other bytes"
                shutil.rmtree(output)
            counts[found] += 1
            print(f"{kill + 1}: {world} ranks: {found}", flush=True)
        done = subprocess.run([*compress, "-o", str(output), "--gpus", "2"], capture_output=True)
        same = not done.returncode and (output / "manifest.json").read_bytes() == wanted
        counts["the last run continued to the same bytes" if same else "WRONG: the last run"] += 1
    for name, count in counts.most_common():
        print(f"{count:4d}  {name}")
    sys.exit(any(name.startswith(("HANGS", "WRONG")) for name in counts))


if __name__ == "__main__":
    main()
