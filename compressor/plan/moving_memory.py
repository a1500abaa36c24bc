"""Memory of units on their way from the disk and back, from shapes alone."""

from collections import Counter

from compressor.plan.plan import Plan
from compressor.plan.verify_memory import source_bytes


def streamed_bytes(plan: Plan) -> int:
    """One unit being read ahead, one being worked on, one being written."""
    raw = [sum(source_bytes(plan, unit.layout)) for unit in plan.units]
    out = [sum(spec.nbytes for spec in unit.outputs.values()) for unit in plan.units]
    return max(sum(raw[i : i + 2]) + (out[i - 1] if i else 0) for i in range(len(raw)))


def page_locked_bytes(plan: Plan, *, ahead: bool) -> int:
    """What a GPU's units are read into and written from: two units as they were read, or one where
    blocks are on the GPU by the time the next is read (`ahead`), and the outputs of two that wait
    to be written. PyTorch takes page-locked memory in powers of two for every piece, and keeps what
    is given back for later pieces of the same power."""
    pieces = plan.source.checkpoint.pieces
    read = (pieces(plan.source.names(unit.layout)) for unit in plan.units)
    raw = [Counter(map(_power_of_two, sizes)) for sizes in read]
    out = [Counter(_power_of_two(x.nbytes) for x in unit.outputs.values()) for unit in plan.units]
    most: Counter[int] = Counter()
    for i, unit in enumerate(plan.units):
        there = ahead and unit.layout.kind == "block"
        coming = raw[i + 1 : i + 2] if there else raw[i : i + 2]
        most |= sum((*coming, *out[max(i - 1, 0) : i + 1]), Counter())
    return sum(size * count for size, count in most.items())


def ahead_bytes(plan: Plan) -> int:
    """A block that is brought to the GPU while the one before it is worked on; 0 where none is:
    its weights are decoded in main memory, or a block is worked on for long."""
    if plan.source.quantized or any(unit.tuned for unit in plan.units):
        return 0
    blocks = (unit.layout for unit in plan.units if unit.layout.kind == "block")
    return max((sum(source_bytes(plan, layout)) for layout in blocks), default=0)


def _power_of_two(nbytes: int) -> int:
    return 1 << max(nbytes - 1, 0).bit_length()
