"""What a kernel benchmark yields: figures, each beside its peer of the same run, as a table."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from timing import graph_ms

RED: list[str] = []
"""Kernels that were wrong in this run."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `share` is a ratio to `peer`: above one is faster, or it is a part of a ceiling;
    `target` is what the share is to reach."""

    family: str
    kernel: str
    shape: str
    us: float
    rate: float
    unit: str
    peer: str = ""
    share: float | None = None
    target: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is reached; empty where there is none."""
        if self.target is None or self.share is None:
            return ""
        return "reached" if self.share >= self.target else "MISSED"

    def line(self) -> str:
        """The row in a table of fixed columns."""
        beside = "" if self.share is None else f"{self.share:6.2f}x {self.peer}"
        goal = "" if self.target is None else f"  (target {self.target:.2f}: {self.verdict})"
        return (
            f"  {self.kernel:<52} {self.shape:<20} {self.us:9.1f} us {self.rate:7,.0f} "
            f"{self.unit:<8} {beside}{goal}"
        )


def per_call_us(run: Callable[[int], object], *, sets: int, repeats: int = 15) -> float:
    """Median microseconds of `run(i)`, from a CUDA graph that holds one call for each of `sets`
    sets of tensors, together larger than the L2 cache."""

    def all_sets() -> None:
        for i in range(sets):
            run(i)

    return graph_ms(all_sets, repeats=repeats, inner=1) * 1e3 / sets


def gate(what: str, out: Callable[[], float], limit: float) -> bool:
    """Whether the error that `out` computes is within the limit: no figure on a red gate.

    A kernel that asks for more shared memory or registers than the device has is left out too.
    """
    from triton.runtime.errors import OutOfResources

    try:
        error = out()
    except OutOfResources as refused:
        print(f"  {what:<76} does not fit: {refused}", flush=True)
        return False
    fine = error <= limit
    print(
        f"  {what:<76} error {error:.2e} (limit {limit:.0e}){'' if fine else '  RED'}", flush=True
    )
    if not fine:
        RED.append(what)
    return fine


def table(rows: list[Row]) -> str:
    """All rows by family, then those with targets once more, and one JSON object a line."""
    lines: list[str] = []
    for family in dict.fromkeys(row.family for row in rows):
        lines.append(f"\n{family}")
        lines += [row.line() for row in rows if row.family == family]
    lines.append("\nJSON")
    lines += [json.dumps(asdict(row)) for row in rows]
    lines.append("\nTargets")
    lines += [row.line() for row in rows if row.target is not None]
    return "\n".join(lines)
