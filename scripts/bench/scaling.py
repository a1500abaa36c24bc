"""A model of what a block costs on several GPUs, fitted to what `ranks.py` measured.

    python scripts/bench/scaling.py RESULTS.txt ... [--predict 4 8]

Seconds of a block on W GPUs for n tokens:

    s + o·[W > 1] + q / W + c·n / W + x·n·(W − 1) / W

s  what every rank does: launching kernels, waiting, what was left undivided, writing where the disk
   is behind;  o  what more than one adds: exchanges of values
q  what is divided and does not depend on tokens: searches, rounding, packing, reading
c  what is divided and does: forward passes, Gram matrices
x  vectors that go from rank to rank

Terms are not negative; where fewer explain the runs as well, the others are zero. A method that was
run with one number of tokens has s and q alone. Prints the terms, how far the model is off each
run, and what it says of numbers of GPUs that were not run: a prediction, nothing measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TERMS = ("s", "o", "q", "c", "x")


def features(gpus: int, tokens: float, *, several: bool) -> list[float]:
    """What each term is multiplied with; tokens are in millions."""
    by_tokens = [tokens / gpus, tokens * (gpus - 1) / gpus] if several else [0.0, 0.0]
    return [1.0, float(gpus > 1), 1 / gpus, *by_tokens]


def fitted(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, bool]:
    """The terms, and whether runs with several numbers of tokens tell those apart."""
    several = len({run["tokens"] for run in runs}) > 1
    table = np.array([features(r["gpus"], r["tokens"] / 1e6, several=several) for r in runs])
    seconds = np.array([run["block_s"] for run in runs])
    table, best, least = table / seconds[:, None], np.zeros(len(TERMS)), np.inf
    # Relative errors count.
    for count in range(1, min(len(runs), len(TERMS)) + 1):
        for chosen in itertools.combinations(range(len(TERMS)), count):
            some, *_ = np.linalg.lstsq(table[:, chosen], np.ones(len(runs)), rcond=None)
            off = float(np.abs(table[:, chosen] @ some - 1).max())
            if (some >= 0).all() and off < least - 0.002:
                least, best = off, np.zeros(len(TERMS))
                best[list(chosen)] = some
    return best, several


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="what ranks.py printed")
    parser.add_argument("--predict", type=int, nargs="*", default=[4, 8])
    options = parser.parse_args()
    lines = [line for file in options.results for line in file.read_text().splitlines()]
    runs = [json.loads(line) for line in lines if line.startswith("{")]
    methods: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        methods.setdefault(run["case"].removesuffix("-long"), []).append(run)
    print("| method | " + " | ".join(TERMS) + " | largest error |")
    print("|---" * (len(TERMS) + 2) + "|")
    rows = []
    for name, some in methods.items():
        terms, several = fitted(some)

        def cost(gpus: int, tokens: float, terms: Any = terms, several: bool = several) -> float:
            return float(np.dot(features(gpus, tokens / 1e6, several=several), terms))

        off = max(abs(cost(r["gpus"], r["tokens"]) / r["block_s"] - 1) for r in some)
        print(f"| {name} | " + " | ".join(f"{t:.3f}" for t in terms) + f" | {off:.1%} |")
        for tokens in sorted({run["tokens"] for run in some}):
            one = cost(1, tokens)
            for gpus in options.predict:
                guess = cost(gpus, tokens)
                rows.append(f"| {name} | {tokens:,} | {gpus} | {guess:.3f} | {one / guess:.2f} |")
    print("\n| method | tokens | GPUs | a block, predicted | times as fast, predicted |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
