"""Forward passes over all rows, in batches that are halved where memory does not do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from compressor.run.settings import JobSettings
from compressor.runner.block_runner import Block

T = TypeVar("T")


def halving(settings: JobSettings, attempt: Callable[[int], T]) -> T:
    """What an attempt gives with as many rows at a time as memory allows."""
    while True:
        try:
            return attempt(settings.batch)
        except torch.OutOfMemoryError:
            _halve(settings)


def advance(
    block: Block, rows: Tensor, settings: JobSettings, batches: Sequence[int] | None
) -> list[int]:
    """Run all rows [rows, length, hidden] through a block, in place; the batches it took.

    batches  those that it took before, which it takes again
    Rows are replaced as soon as they are done, so that running out of memory loses nothing; the
    batches are recorded because other batches may round otherwise.
    """
    used: list[int] = []
    start = 0
    while start < rows.shape[0]:
        if batches is not None:
            size = batches[len(used)]
            out = block.forward(rows[start : start + size])
        else:
            size = min(settings.batch, rows.shape[0] - start)
            try:
                out = block.forward(rows[start : start + size])
            except torch.OutOfMemoryError:
                _halve(settings)
                continue
        rows[start : start + size] = out.to(rows.dtype)
        used.append(size)
        start += size
    return used


def _halve(settings: JobSettings) -> None:
    """Half as many rows at a time; called while the error is handled, which is raised again where
    there is but one."""
    if settings.batch == 1:
        raise
    settings.batch //= 2
    torch.cuda.empty_cache()
