"""Thousands of broken inputs, each with its exit code, its words, its time and its memory judged.

    python scripts/fuzz.py --count 5000
    python scripts/fuzz.py --kind gguf --seed 1234 --count 1     # one again, with what it says

Cases run one after the other in a process of their own, which is ended and started again where one
hangs. Prints a line for each fault, and a table of counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HANG_SECONDS = 20.0
"""Of processor time; six times as long in all, since machines are busy."""
MORE_MEMORY = 1 << 30
"""Bytes above what the process takes for sound inputs."""


def work(root: Path, kind: str, first: int, count: int, *, loud: bool) -> None:
    """Run cases; a JSON line on stdout when each begins and when it has ended."""
    sys.path.insert(0, str(ROOT))
    from tests.support.fuzz_cases import Corpus
    from tests.support.fuzzing import typed

    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    corpus = Corpus(root)
    baseline = None
    for seed in range(first, first + count):
        case = corpus.case(kind, seed)
        print(json.dumps({"begin": seed, "what": case.what}), file=out, flush=True)
        os.chdir(case.folder)
        sys.argv = ["compress", *case.arguments]
        said = io.StringIO()
        started = time.process_time()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code, fault = typed(said.getvalue)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        baseline = peak if baseline is None else baseline
        if peak - baseline > MORE_MEMORY:
            fault = fault or f"{(peak - baseline) / 1e9:.1f} GB more memory"
            baseline = peak
        end: dict[str, Any] = {"end": seed, "code": code, "fault": fault, "what": case.what}
        seconds = time.process_time() - started
        if seconds > HANG_SECONDS:
            end["fault"] = end["fault"] or f"{seconds:.0f} s"
        end |= {"seconds": seconds, "typed": " ".join(case.arguments)}
        print(json.dumps(end), file=out, flush=True)
        if loud:
            print(said.getvalue(), file=sys.__stderr__)


def run(root: Path, kind: str, first: int, count: int, *, loud: bool) -> tuple[Counter[str], float]:
    """Cases of one kind; counts, and the longest time of one."""
    found: Counter[str] = Counter()
    longest = 0.0
    seed, last = first, first + count
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(root / "cache")}
    while seed < last:
        command = [sys.executable, __file__, "--worker", str(root), "--kind", kind]
        command += ["--seed", str(seed), "--count", str(last - seed), *(["--loud"] if loud else [])]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert worker.stdout is not None
        selector = selectors.DefaultSelector()
        selector.register(worker.stdout, selectors.EVENT_READ)
        begun: dict[str, Any] = {}
        while seed < last:
            # The corpus is made, and libraries are imported, before the first case.
            if not selector.select(6 * HANG_SECONDS if begun else 600):
                found["hang"] += 1
                print(f"{kind} {seed}: no end after {6 * HANG_SECONDS:.0f} s: {begun}", flush=True)
                seed += 1
                break
            line = worker.stdout.readline()
            if not line:
                found["died"] += 1
                print(f"{kind} {seed}: died with {worker.wait()}: {begun}", flush=True)
                seed += 1
                break
            event = json.loads(line)
            if "begin" in event:
                begun = event
                continue
            seed = event["end"] + 1
            longest = max(longest, event["seconds"])
            found[f"exit {event['code']}"] += 1
            if event["fault"]:
                found["fault"] += 1
                print(f"{kind} {event}", flush=True)
        worker.kill()
        worker.wait()
    return found, longest


def main() -> int:
    """The table, and 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="cases of all kinds together")
    parser.add_argument("--kind", help="one kind only")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    parser.add_argument("--loud", action="store_true", help="print what each case says")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.worker, asked.kind, asked.seed, asked.count, loud=asked.loud)
        return 0
    sys.path.insert(0, str(ROOT))
    from tests.support.fuzz_cases import KINDS

    kinds = [asked.kind] if asked.kind else list(KINDS)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        for kind in kinds:
            count = -(-asked.count // len(kinds))
            found, longest = run(Path(root), kind, asked.seed, count, loud=asked.loud)
            total += found
            shown = ", ".join(f"{name}: {n}" for name, n in sorted(found.items()))
            print(f"{kind:14} {count:5}  {shown}; longest {longest:.1f} s", flush=True)
    print(f"all: {', '.join(f'{name}: {n}' for name, n in sorted(total.items()))}")
    return int(any(total[name] for name in ("fault", "hang", "died")))


if __name__ == "__main__":
    sys.exit(main())
