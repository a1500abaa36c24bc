"""How much of a model is worked on at once, which bounds the memory of copies in wide floats."""

from collections.abc import Iterator

from torch import Tensor

DECODERS = 4
CODED_AHEAD = 16
"""The same where a GPU makes the floats, and the processor is asked for codes alone."""
AHEAD_ELEMENTS = 2**27
"""Layers decoded at once, and the most weights of them in float64 beside the one that is checked:
one gigabyte."""


def row_chunks(weight: Tensor, *, multiple: int = 1, times: int = 1) -> Iterator[slice]:
    """Row ranges, each a multiple of `multiple` rows, that fit in cache (CPU) or 64 MiB (GPU), or
    so many times that."""
    elements = times * (2**24 if weight.is_cuda else 2**18)
    step = max(1, elements // max(1, weight.shape[1]) // multiple) * multiple
    return (slice(row, row + step) for row in range(0, weight.shape[0], step))


def layers_ahead(shape: tuple[int, int], workers: int = DECODERS, *, width: int = 8) -> int:
    """How many layers of this shape are decoded beside the one that is checked, in arrays of
    `width` bytes for each weight."""
    return max(1, min(workers, AHEAD_ELEMENTS * 8 // (width * shape[0] * shape[1])))
