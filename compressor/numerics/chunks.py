"""Rows of a weight a few at a time, which bounds the memory of float32 copies."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def row_chunks(weight: Tensor, *, multiple: int = 1) -> Iterator[slice]:
    """Row ranges, each a multiple of `multiple` rows, that fit in cache (CPU) or 64 MiB (GPU)."""
    elements = 2**24 if weight.is_cuda else 2**18
    step = max(1, elements // max(1, weight.shape[1]) // multiple) * multiple
    return (slice(row, row + step) for row in range(0, weight.shape[0], step))
