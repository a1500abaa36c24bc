"""Main memory of units on their way from the disk and back, from shapes alone."""

from __future__ import annotations

from collections import Counter

from compressor.plan.plan import Plan
from compressor.plan.verify_memory import source_bytes


def streamed_bytes(plan: Plan) -> int:
    """One unit being read ahead, one being worked on, one being written."""
    raw = [sum(source_bytes(plan, unit.layout)) for unit in plan.units]
    out = [sum(spec.nbytes for spec in unit.outputs.values()) for unit in plan.units]
    return max(sum(raw[i : i + 2]) + (out[i - 1] if i else 0) for i in range(len(raw)))


def page_locked_bytes(plan: Plan) -> int:
    """What a GPU's units are read into and written from: two units as they were read, and the
    outputs of two that wait to be written. PyTorch takes page-locked memory in powers of two for
    every tensor, and keeps what is given back for later tensors of the same power."""
    raw = [Counter(map(_power_of_two, source_bytes(plan, unit.layout))) for unit in plan.units]
    out = [Counter(_power_of_two(x.nbytes) for x in unit.outputs.values()) for unit in plan.units]
    most: Counter[int] = Counter()
    for i in range(len(raw)):
        most |= sum((*raw[i : i + 2], *out[max(i - 1, 0) : i + 1]), Counter())
    return sum(size * count for size, count in most.items())


def _power_of_two(nbytes: int) -> int:
    return 1 << max(nbytes - 1, 0).bit_length()
