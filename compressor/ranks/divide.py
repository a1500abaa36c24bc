"""Divides pieces of unequal work."""

from collections.abc import Sequence


def owners(
    costs: Sequence[float], world: int, fixed: Sequence[int | None] | None = None
) -> list[int]:
    """Which of `world` ranks takes each piece: the costliest first, to whoever has least so far.

    fixed  the ranks of those that are a rank's already
    """
    known = fixed or [None] * len(costs)
    loads = [0.0] * world
    found = [-1 if rank is None else rank for rank in known]
    for rank, cost in zip(found, costs, strict=True):
        if rank >= 0:
            loads[rank] += cost
    free = [i for i, rank in enumerate(found) if rank < 0]
    for index in sorted(free, key=lambda i: (-costs[i], i)):
        rank = min(range(world), key=lambda r: (loads[r], r))
        found[index] = rank
        loads[rank] += costs[index]
    return found
