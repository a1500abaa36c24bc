"""Which of several candidates may have the least loss, as some rows tell.

Losses add up over rows, and those of two candidates go up and down together, so that a few hundred
rows tell most of them apart from the best. Whoever has to know which is best works the rest out on
all rows: what is left out here would have to be further from its mean than `ERRORS`. On a CPU rows
are looked at in parts, each once, and candidates go in between.
"""

import math
from collections.abc import Sequence

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


def stride(rows: int) -> int | None:
    """Of how many rows one is looked at; None where there are too few for that."""
    step = min(rows // ROWS, MOST)
    return step if step >= LEAST else None


def looks(rows: int) -> int:
    """How many parts of equal size rows have that are looked at one after the other, all but the
    last."""
    return min(rows // LOOK, MOST)


def careful(known: int, rows: int) -> float:
    """Standard errors beyond which a candidate is given up, where so many of all `rows`, spread
    over them, are known."""
    return CAREFUL * math.sqrt(1 - known / rows)


def chosen(values: Tensor, places: Sequence[int]) -> Tensor:
    """Some of `values`, in this order, without the wait for the device that a list as index is."""
    if list(places) == list(range(len(values))):
        return values
    return values.index_select(0, torch.tensor(places).to(values.device, non_blocking=True))


def remaining(losses: Tensor, errors: float = ERRORS) -> list[int]:
    """Candidates that may have the least loss, by number, as losses [candidates, rows] tell, NaN
    and infinity allowed: what is not finite is not judged."""
    means = losses.mean(1).nan_to_num(nan=torch.inf)
    over = losses - losses.index_select(0, means.argmin()[None])  # without asking which
    error = over.std(1) / losses.shape[1] ** 0.5
    may = torch.logical_not(over.mean(1) > errors * error)
    return [number for number, stays in enumerate(may.tolist()) if stays]
