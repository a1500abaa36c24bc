"""Check kernels against their references, then time each beside its peers on the CUDA device.

    python scripts/bench/run.py w4a16 nvfp4 w4a8        # families; without a name: all of them
    python scripts/bench/run.py sparse_attention --only MoBA  # cases whose names have this in them
    python scripts/bench/run.py --tiny                  # tiny shapes on a CPU, no times

A family is a file in `families/`, whose `cases(setup)` yields one case after the other, so that
only one holds tensors. Times come from CUDA graphs that rotate over more memory than the L2 cache
holds; peers and the bandwidth of a copy are measured in the same run. A kernel that is wrong has no
figure, and the exit code is 1. The table is Markdown; --json writes all figures.
"""

import importlib
import json
import os
import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

sys.path.extend(map(str, Path(__file__).resolve().parents[:2]))
from case import Call, Case, Setup
from tables import markdown

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "families").glob("[!_]*.py"))
HEAD = ("family", "kernel", "shape", "time", "rate", "of copy", "beside", "")


@dataclass(frozen=True)
class Row:
    """The figures of one kernel."""

    family: str
    name: str
    shape: str
    error: float
    note: str = ""
    us: float = float("nan")
    gbps: float = 0.0
    tops: float = 0.0
    of_copy: float = 0.0
    peers_us: dict[str, float] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def cells(self) -> Iterator[str]:
        yield from (self.family, self.name, self.shape, f"{self.us:.1f} µs")
        rates = ((self.gbps, "GB/s"), (self.tops, "TOP/s"))
        yield ", ".join(f"{rate:,.0f} {unit}" for rate, unit in rates if rate)
        yield f"{self.of_copy:.0%}" if self.of_copy else ""
        yield ", ".join(f"{t / self.us:.2f}x {n} ({t:.1f} µs)" for n, t in self.peers_us.items())
        yield "; ".join([*filter(None, [self.note]), *(f"MISSED: {what}" for what in self.missed)])


def per_call_us(call: Call) -> float:
    """Median microseconds of a call, from CUDA graphs that go through all of its sets."""

    def all_sets() -> None:
        for i in range(len(call.sets)):
            call(i)

    return do_bench_cudagraph(all_sets, return_mode="median") * 1e3 / len(call.sets)


def copy_gbps() -> float:
    """Device-to-device copy of 4 GiB in GB/s, bytes read plus bytes written.

    Without a graph: as a node of one, a copy moved 2.75 TB/s on a device whose kernels moved 3.98.
    """
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


class Runner:
    """Goes through cases; what was wrong is in `red`."""

    def __init__(self, setup: Setup, *, only: str = "") -> None:
        self.setup, self.only = setup, only
        self.copy = 0.0 if setup.tiny else copy_gbps()
        self.rows: list[Row] = []
        self.red: list[str] = []
        self._known: dict[Call, float] = {}

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

    def case(self, family: str, case: Case) -> None:
        """Check it and, if it is right, time it."""
        out = case()
        error = case.error(out, case.reference(*case.sets[0], **case.how))
        name = f"{family}: {case.name}, {case.shape}"
        fine = error <= case.limit
        said = f"error {error:.1e} of {case.limit:.0e}{'' if fine else '  RED'}"
        print(f"  {name}: {said}", flush=True)
        if not fine:
            self.red.append(name)
            return
        if self.setup.tiny:
            for peer in case.peers.values():
                tried(peer)
        figures = {} if self.setup.tiny else self._timed(case, case.bytes_moved(out))
        self.rows.append(Row(family, case.name, case.shape, error, case.note, **figures))

    def _timed(self, case: Case, moved: float) -> dict[str, Any]:
        us = per_call_us(case)
        gbps = moved / us / 1e3
        for peer in case.peers.values():
            if peer not in self._known:
                self._known[peer] = per_call_us(peer)
        peers_us = {name: self._known[peer] for name, peer in case.peers.items()}
        reached = {"copy": gbps / self.copy, **{name: t / us for name, t in peers_us.items()}}
        missed = [f"{name} {x:g}" for name, x in case.targets.items() if reached[name] < x]
        rates = {"gbps": gbps, "tops": case.ops / us / 1e6, "of_copy": gbps / self.copy}
        return {"us": us, **rates, "peers_us": peers_us, "missed": missed}


def tried(peer: Call) -> None:
    try:
        peer()
    except (RuntimeError, AttributeError) as error:
        print(f"    a peer needs a GPU: {str(error)[:60]}")


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their names")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, no times")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if unknown := sorted(set(options.families) - set(FAMILIES)):
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny runs on a CPU")
    torch.manual_seed(0)
    runner = Runner(Setup(options.tiny), only=options.only)
    gpu = "a CPU" if options.tiny else torch.cuda.get_device_name()
    about = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    about |= {"copy_gbps": runner.copy}
    print(about, flush=True)
    with torch.inference_mode():
        for name in options.families or FAMILIES:
            runner.family(name)
    print(f"\n{markdown(HEAD, (row.cells() for row in runner.rows))}")
    if options.json:
        found = {**about, "red": runner.red, "rows": [asdict(row) for row in runner.rows]}
        options.json.write_text(json.dumps(found, indent=1))
    print(json.dumps({"red": runner.red, "missed": [r.name for r in runner.rows if r.missed]}))
    return int(bool(runner.red))


if __name__ == "__main__":
    sys.exit(main())
