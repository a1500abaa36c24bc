"""Thousands of broken inputs, each with its exit code, its words, its time and its memory judged.

    python scripts/fuzz.py --count 5000
    python scripts/fuzz.py --kind gguf --seed 1234 --count 1     # one again, with what it says

Cases run one after the other in a process of their own, which is ended and started again where one
hangs. Prints a line for each fault, and a table of counts.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.fuzz_cases import KINDS, Corpus
from tests.support.fuzzing import typed

HANG_SECONDS = 20.0
"""Of processor time; six times as long in all, since machines are busy."""
MORE_MEMORY = 1 << 30
"""Bytes above what the process takes for sound inputs."""


def work(root: Path, kind: str, seeds: range, told: Connection, *, loud: bool) -> None:
    """Run cases; what each is when it begins, and what came of it when it has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    corpus = Corpus(root)
    baseline = None
    for seed in seeds:
        case = corpus.case(kind, seed)
        told.send(case.what)
        os.chdir(case.folder)
        sys.argv = ["compress", *case.arguments]
        said = io.StringIO()
        started = time.process_time()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code, fault = typed(said.getvalue)
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        baseline = peak if baseline is None else baseline
        if peak - baseline > MORE_MEMORY:
            fault = fault or f"{(peak - baseline) / 1e9:.1f} GB more memory"
            baseline = peak
        if seconds > HANG_SECONDS:
            fault = fault or f"{seconds:.0f} s"
        told.send((code, fault and f"{fault}: compress {' '.join(case.arguments)}", seconds))
        if loud:
            print(said.getvalue(), file=sys.__stderr__)


def run(root: Path, kind: str, seeds: range, *, loud: bool) -> tuple[Counter[str], float]:
    """Cases of one kind; counts, and the longest time of one."""
    found: Counter[str] = Counter()
    longest = 0.0
    spawn = multiprocessing.get_context("spawn")
    while seeds:
        told, there = spawn.Pipe(duplex=False)
        worker = spawn.Process(target=work, args=(root, kind, seeds, there), kwargs={"loud": loud})
        worker.start()
        there.close()
        while seeds:
            what, fault = "the corpus", ""
            try:
                # The corpus is made, and libraries are imported, before the first case.
                for wait in (600, 6 * HANG_SECONDS):
                    if not told.poll(wait):
                        raise TimeoutError
                    event = told.recv()
                    what = what if isinstance(event, tuple) else event
                code, fault, seconds = event
                longest = max(longest, seconds)
                found[f"exit {code}"] += 1
                found["fault"] += bool(fault)
            except TimeoutError:
                fault = "hang"
            except EOFError:
                fault = "died"
            if fault:
                print(f"{kind} {seeds[0]}: {fault}: {what}", flush=True)
            seeds = seeds[1:]
            if fault in ("hang", "died"):
                found[fault] += 1
                break
        worker.kill()
        worker.join()
    return +found, longest


def main() -> int:
    """The table, and 1 where there was a fault."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="cases of all kinds together")
    parser.add_argument("--kind", choices=KINDS, help="one kind only")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    parser.add_argument("--loud", action="store_true", help="print what each case says")
    asked = parser.parse_args()
    kinds = [asked.kind] if asked.kind else list(KINDS)
    count = -(-asked.count // len(kinds))
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        os.environ |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": f"{root}/cache"}
        for kind in kinds:
            seeds = range(asked.seed, asked.seed + count)
            found, longest = run(Path(root), kind, seeds, loud=asked.loud)
            total += found
            shown = ", ".join(f"{name}: {n}" for name, n in sorted(found.items()))
            print(f"{kind:14} {count:5}  {shown}; longest {longest:.1f} s", flush=True)
    print(f"all: {', '.join(f'{name}: {n}' for name, n in sorted(total.items()))}")
    return int(any(total[name] for name in ("fault", "hang", "died")))


if __name__ == "__main__":
    sys.exit(main())
