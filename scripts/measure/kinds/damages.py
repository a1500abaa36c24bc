"""Damages written checkpoints, signs their manifests again, counts what `verify --against` sees.

    python scripts/measure/run.py damages [--only rtn4 awq4] [--every N]

Every damage is measured, beside what rounding did (`tests/support/damages.py`). A damage that is
not seen and is larger than rounding is a miss, and the exit code 1.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from variant import Bench, Figures, Variant

from compressor.verify.kernels import check as kernel_checks

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from tests.support.damages import CASES, Case


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--every", type=int, default=1, help="try one of so many damages")


def measure(bench: Bench, case: str) -> Figures:
    """Counts of one case, and a line for each damage."""
    # The kernels are not what is tried here: their plain references answer in less time.
    kernel_checks.interpreter_runs = lambda: False  # type: ignore[assignment]
    found = list(Case(case, bench.work).run(bench.options.every))
    for x in found:
        mark = "WRONG" if x.missed else "seen" if x.seen else "small"
        kl = "no logits" if x.kl is None else f"{x.kl:.2g}"
        print(f"  {mark:<6} {kl:>10} {x.rounding:.2g}  {x.damage}", flush=True)
    large = [x for x in found[1:] if x.kl is None or x.kl > x.rounding]
    return {
        "damages": len(found) - 1,
        "larger than rounding": len(large),
        "seen": sum(x.seen for x in large),
        "smaller, seen": sum(x.seen for x in found[1:] if x not in large),
        "KL of rounding": found[0].rounding,
        "missed": ", ".join(x.damage for x in found if x.missed),
    }


def variants(bench: Bench) -> Iterator[Variant]:
    for case, (model, *_) in CASES.items():
        yield Variant(f"{case} ({model})", lambda case=case: measure(bench, case))


def judge(rows: dict[str, Figures]) -> Iterator[str]:
    """What was missed."""
    yield from (f"{name}: {row['missed']}" for name, row in rows.items() if row["missed"])
