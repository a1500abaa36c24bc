"""Chunks of rows, one forward pass each, that several ranks run at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compressor.ranks.ranks import Form, Ranks


class AgreedShortage(torch.OutOfMemoryError):
    """Some rank's device has too little memory, as all of them know."""


def rounds(
    ranks: Ranks, rows: int, batch: int, forward: Callable[[int, int], list[Tensor]]
) -> Iterator[list[list[Tensor]]]:
    """What a forward pass makes of each chunk, chunks of all ranks in their order, some at a time.

    rows     of this rank, which it runs in chunks of `batch`
    forward  (start, stop) → tensors as `Ranks.gather_rows` takes them
    What one round gave is on its way while the next one runs.
    Raises torch.OutOfMemoryError on all ranks where one of them is short of memory.
    """
    forms: list[Form] = []
    coming: Callable[[], list[list[Tensor]]] | None = None
    for start in range(0, rows + batch * ranks.world, batch):
        count = max(min(batch, rows - start), 0)
        found: list[Tensor] = []
        short = False
        try:
            found = forward(start, start + count) if count else []
        except torch.OutOfMemoryError:
            if ranks.world == 1:
                raise
            short = True
        said = ranks.numbers(count, int(short))
        if any(lacks for _, lacks in said):
            raise AgreedShortage
        counts = [rows for rows, _ in said]
        arrived = ranks.gather_rows(found, counts, forms) if any(counts) else None
        del found
        if coming is not None:
            yield coming()
        coming = arrived
        if coming is None:
            return
