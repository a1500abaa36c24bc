"""Check kernels against their references, then time each beside its peers on the CUDA device.

    python scripts/bench/run.py w4a16 nvfp4 w4a8        # families; without a name: all of them
    python scripts/bench/run.py sparse_attention --only MoBA  # cases whose names have this in them
    python scripts/bench/run.py --tiny                  # tiny shapes on a CPU, no times

A family is a file or a folder in `families/`, whose `cases(setup)` yields one case after the other,
so that only one holds tensors. Times come from CUDA graphs that rotate over more memory than the L2
cache holds; peers and the bandwidth of a copy are measured in the same run. A kernel that is wrong
has no figure, and the exit code is 1. The table is Markdown; --json writes all figures.
"""

import argparse
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "families").glob("[!_]*"))


@dataclass
class Row:
    """The figures of one kernel; `beside` has how many times as fast as each peer it is."""

    family: str
    name: str
    shape: str
    error: float
    us: float = float("nan")
    gbps: float = 0.0
    tops: float = 0.0
    of_copy: float = 0.0
    of_peak: float = 0.0
    beside: dict[str, float] = field(default_factory=dict)
    peers_us: dict[str, float] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Runner:
    """Goes through cases; what was wrong is in `red`."""

    def __init__(self, setup: Any, *, only: str = "") -> None:
        from timing import copy_gbps, peak_gbps

        self.setup, self.only = setup, only
        self.copy, self.peak = (0.0, 0.0) if setup.tiny else (copy_gbps(), peak_gbps())
        self.rows: list[Row] = []
        self.red: list[str] = []
        self._known: dict[int, tuple[Any, float]] = {}

    def family(self, name: str) -> None:
        """All cases of one, whose failure leaves the others their say."""
        module = importlib.import_module(f"families.{name}")
        try:
            for case in module.cases(self.setup):
                if self.only in case.name:
                    self.case(name, case)
        except Exception:
            traceback.print_exc()
            self.red.append(name)
        self._known.clear()
        if not self.setup.tiny:
            gc.collect()
            import torch

            torch.cuda.empty_cache()

    def case(self, family: str, case: Any) -> None:
        """Check it and, if it is right, time it."""
        name, want = case.name, case.want()
        error = case.error(case.run(0), want)
        fine = error <= case.limit
        said = f"error {error:.1e} of {case.limit:.0e}{'' if fine else '  RED'}"
        print(f"  {family}: {name}, {case.shape}: {said}", flush=True)
        if not fine:
            self.red.append(f"{family}: {name}, {case.shape}")
            return
        self.rows.append(row := Row(family, name, case.shape, error))
        if self.setup.tiny:
            for peer in case.peers.values():
                self._tried(peer)
        else:
            self._timed(row, case)
        if case.note is not None:
            row.notes.append(case.note())

    def _tried(self, peer: Any) -> None:
        try:
            peer.run(0)
        except (RuntimeError, AttributeError) as error:
            print(f"    a peer needs a GPU: {str(error)[:60]}")

    def _timed(self, row: Row, case: Any) -> None:
        from timing import per_call_us

        row.us = per_call_us(case.run, sets=case.sets)
        row.gbps, row.tops = case.moved / row.us / 1e3, case.ops / row.us / 1e6
        row.of_copy, row.of_peak = row.gbps / self.copy, row.gbps / self.peak
        for name, peer in case.peers.items():
            if id(peer) not in self._known:  # kept alive, so that no other has its id
                self._known[id(peer)] = (peer, per_call_us(peer.run, sets=peer.sets))
            row.peers_us[name] = self._known[id(peer)][1]
            row.beside[name] = row.peers_us[name] / row.us
        reached = {**row.beside, "copy": row.of_copy}
        row.missed = [f"{n} {t:g}" for n, t in case.targets.items() if reached[n] < t]


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown."""
    yield "| family | kernel | shape | time | rate | of copy | of peak | beside | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        rates = [f"{row.gbps:,.0f} GB/s"] if row.gbps else []
        rates += [f"{row.tops:,.0f} TOP/s"] if row.tops else []
        beside = [f"{x:.2f}x {n} ({row.peers_us[n]:.1f} µs)" for n, x in row.beside.items()]
        notes = [*row.notes, *(f"MISSED: {what}" for what in row.missed)]
        cells = [row.family, row.name, row.shape, f"{row.us:.1f} µs", ", ".join(rates)]
        cells += [f"{x:.0%}" if x > 0 else "" for x in (row.of_copy, row.of_peak)]
        cells += [", ".join(beside), "; ".join(notes)]
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their names")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, no times")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if unknown := sorted(set(options.families) - set(FAMILIES)):
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch
    import triton
    from case import Setup

    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny runs on a CPU")
    torch.manual_seed(0)
    gpu = "a CPU" if options.tiny else torch.cuda.get_device_name()
    about = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    runner = Runner(Setup(options.tiny), only=options.only)
    about |= {"copy_gbps": runner.copy, "peak_gbps": runner.peak}
    print(about, flush=True)
    with torch.inference_mode():
        for name in options.families or FAMILIES:
            runner.family(name)
    print("\n".join(["", *table(runner.rows)]))
    found = {**about, "red": runner.red, "rows": [asdict(row) for row in runner.rows]}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(json.dumps({"red": runner.red, "missed": [r.name for r in runner.rows if r.missed]}))
    return int(bool(runner.red))


if __name__ == "__main__":
    sys.exit(main())
