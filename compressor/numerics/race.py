"""Which of several candidates may have the least loss, as some rows tell.

Losses add up over rows, and those of two candidates go up and down together, so that a few hundred
rows tell most of them apart from the best. Whoever has to know which is best works the rest out on
all rows: what is left out here would have to be further from its mean than `ERRORS`. On a CPU rows
are looked at in parts, each once, and candidates go in between.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS = 128
"""Rows that are looked at, at least."""

LEAST, MOST = 4, 16
"""One row of so many is looked at. Where fewer than `LEAST` would leave too few rows, looking costs
more than it saves."""

ERRORS = 6.0
"""Standard errors of the mean difference to the best, beyond which a candidate is given up."""

LOOK = 64
"""Rows that are looked at between two decisions, at least, where they are looked at in parts."""

CAREFUL = 4.0
"""`ERRORS` of what is still unknown, where rows are looked at in parts."""

Losses = Callable[[Sequence[int]], Tensor]
"""Candidates, by number → their losses by row [candidates, rows], NaN and infinity allowed."""


def stride(rows: int) -> int | None:
    """Of how many rows one is looked at; None where there are too few for that."""
    step = min(rows // ROWS, MOST)
    return step if step >= LEAST else None


def closer(step: int, left: int, count: int) -> int | None:
    """Of how many rows one is looked at next, where one of `step` left so many of `count`
    candidates; None where that would cost more than it saves."""
    return step // LEAST if step >= 2 * LEAST and LEAST < left < count else None


def shortlist(losses_of: Losses, count: int) -> list[int]:
    """Those of `count` candidates, which lie in an order, that may be the best.

    Where even the ends and the middle cannot be told apart, nothing is looked at further.
    """
    ends = sorted({0, count // 2, count - 1})
    known = losses_of(ends)
    if bool(_may_be_best(known).all()):
        return list(range(count))
    others = [i for i in range(count) if i not in ends]
    order = [*ends, *others]
    losses = torch.cat([known, losses_of(others)])
    losses = chosen(losses, sorted(range(count), key=order.__getitem__))
    return [i for i, may in enumerate(_may_be_best(losses).tolist()) if may]


def looks(rows: int) -> int | None:
    """How many parts of equal size rows have that are looked at one after the other, all but the
    last; None where there are too few rows for that."""
    return None if stride(rows) is None else min(rows // LOOK, MOST)


def remaining(losses: Tensor, rows: int) -> list[int]:
    """Those of candidates that may be the best of all `rows`, as losses [candidates, some rows] of
    some tell, spread over all."""
    unknown = (1 - losses.shape[1] / rows) ** 0.5
    may = _may_be_best(losses, CAREFUL * unknown)
    return [i for i, stays in enumerate(may.tolist()) if stays]


def chosen(values: Tensor, places: Sequence[int]) -> Tensor:
    """Some of `values`, in this order, without the wait for the device that a list as index is."""
    if list(places) == list(range(len(values))):
        return values
    return values.index_select(0, index_of(places, values.device))


def index_of(places: Sequence[int], device: torch.device) -> Tensor:
    """Places as an index, which is on its way to the device."""
    return torch.tensor(places).to(device, non_blocking=True)


def _may_be_best(losses: Tensor, errors: float = ERRORS) -> Tensor:
    """bool [candidates] of losses [candidates, rows]; what is not finite is not judged."""
    means = losses.mean(1).nan_to_num(nan=torch.inf)
    over = losses - losses.index_select(0, means.argmin()[None])  # without asking which
    error = over.std(1) / losses.shape[1] ** 0.5
    return torch.logical_not(over.mean(1) > errors * error)
