"""Divides pieces of unequal work."""

from __future__ import annotations

from collections.abc import Sequence


def owners(costs: Sequence[float], world: int) -> list[int]:
    """Which of `world` ranks takes each piece: the costliest first, to whoever has least so far."""
    loads = [0.0] * world
    found = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(world), key=lambda r: (loads[r], r))
        found[index] = rank
        loads[rank] += costs[index]
    return found
