"""Chunks of rows, one forward pass each, that several ranks run at a time."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compressor.ranks.ranks import AgreedShortage, Form, Ranks
from compressor.runner.stream import Stream


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
    for start in itertools.count(0, batch):
        count = max(min(batch, rows - start), 0)
        found: list[Tensor] = []
        short = False
        try:
            found = forward(start, start + count) if count else []
        except torch.OutOfMemoryError:
            if ranks.world == 1:
                raise
            short = True
        said = ranks.numbers(count, int(short), int(rows > start + batch))
        if any(lacks for _, lacks, _ in said):
            raise AgreedShortage
        counts = [rows for rows, _, _ in said]
        arrived = ranks.gather_rows(found, counts, forms) if any(counts) else None
        del found
        if coming is not None:
            yield coming()
        coming = arrived
        if not any(more for _, _, more in said):
            break
    if coming is not None:
        yield coming()


def every_row(stream: Stream, batch: int, ranks: Ranks) -> Stream:
    """The rows of all ranks, which were dealt out in chunks of `batch`, in their order."""
    if ranks.world == 1:
        return stream

    def held(start: int, stop: int) -> list[Tensor]:
        return [stream.read(start, stop), *stream.beside(start, stop).values()]

    count, at = sum(rows for (rows,) in ranks.numbers(stream.rows)), 0
    whole = [tensor.new_empty(count, *tensor.shape[1:]) for tensor in held(0, 0)]
    for chunks in rounds(ranks, stream.rows, batch, held):
        for chunk in chunks:
            for tensor, rows in zip(whole, chunk, strict=True):
                tensor[at : at + rows.shape[0]] = rows
            at += chunk[0].shape[0]
    names = iter(whole[1:])
    side = {name: next(names) for name in stream.side}
    return Stream(whole[0], side, handed={name: next(names) for name in stream.handed})
