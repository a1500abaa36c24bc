"""Thousands of broken inputs, each with its exit code, its words, its time and its memory judged.

    python scripts/fuzz.py --count 5000
    python scripts/fuzz.py --kind gguf --seed 1234 --count 1     # one again, with what it says

Cases run one after the other in a process of their own, which is ended and started again where one
hangs. Prints a line for each fault, and a table of counts.
"""

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.fuzz_cases import KINDS, Corpus
from tests.support.fuzzing import typed

HANG_SECONDS = 20.0
"""Of processor time; six times as long in all, since machines are busy."""
MORE_MEMORY = 1 << 30
"""Bytes that a case adds to the most that its process took, first use of libraries included."""


def begin() -> None:
    """What libraries print goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def judged(root: Path, kind: str, seed: int, loud: bool) -> tuple[int, str, float]:
    """Exit code, fault and seconds of a case."""
    case = Corpus(root).case(kind, seed)
    os.chdir(case.folder)
    sys.argv = ["compress", *case.arguments]
    said, peak, started = io.StringIO(), peak_bytes(), time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code, fault = typed(said.getvalue)
    seconds, more = time.process_time() - started, peak_bytes() - peak
    if more > MORE_MEMORY:
        fault = fault or f"{more / 1e9:.1f} GB more memory"
    if seconds > HANG_SECONDS:
        fault = fault or f"{seconds:.0f} s"
    if loud:
        print(said.getvalue(), file=sys.__stderr__)
    command = f": {case.what}: compress {' '.join(case.arguments)}"
    return code, fault and fault + command, seconds


def run(root: Path, kind: str, seeds: range) -> tuple[Counter[str], float]:
    """Cases of one kind; counts, and the longest time of one. One alone is shown with its words."""
    found: Counter[str] = Counter()
    longest = 0.0
    spawn = multiprocessing.get_context("spawn")
    pool = spawn.Pool(1, begin)
    for seed in seeds:
        try:
            asked = pool.apply_async(judged, (root, kind, seed, len(seeds) == 1))
            code, fault, seconds = asked.get(6 * HANG_SECONDS)
            longest = max(longest, seconds)
            found[f"exit {code}"] += 1
        except multiprocessing.TimeoutError:
            fault = "hangs, or died"
            pool.terminate()
            pool = spawn.Pool(1, begin)
        if fault:
            found["fault"] += 1
            print(f"{kind} {seed}: {fault}", flush=True)
    pool.terminate()
    return found, longest


def main() -> int:
    """The table, and 1 where there was a fault."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="cases of all kinds together")
    parser.add_argument("--kind", choices=KINDS, help="one kind only")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    asked = parser.parse_args()
    kinds = [asked.kind] if asked.kind else list(KINDS)
    count = -(-asked.count // len(kinds))
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        os.environ |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": f"{root}/cache"}
        Corpus(Path(root))  # made once
        for kind in kinds:
            seeds = range(asked.seed, asked.seed + count)
            found, longest = run(Path(root), kind, seeds)
            total += found
            shown = ", ".join(f"{name}: {n}" for name, n in sorted(found.items()))
            print(f"{kind:14} {count:5}  {shown}; longest {longest:.1f} s", flush=True)
    print(f"all: {', '.join(f'{name}: {n}' for name, n in sorted(total.items()))}")
    return int(total["fault"] > 0)


if __name__ == "__main__":
    sys.exit(main())
