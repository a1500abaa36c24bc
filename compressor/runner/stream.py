"""Rows of hidden states on their way through a model's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from compressor_calibration.store import ActivationStore, Writer
from torch import Tensor

from compressor.ranks.ranks import ALONE, Ranks


class Entering(Protocol):
    """Where rows that enter a block come from."""

    @property
    def rows(self) -> int:
        """How many rows there are."""

    def read(self, start: int, stop: int) -> Tensor:
        """Some rows, [n, length, hidden]."""

    def beside(self, start: int, stop: int) -> Mapping[str, Tensor]:
        """What those rows have beside them."""


@dataclass(slots=True)
class Stream:
    """Rows of one model between two of its blocks.

    hidden  [rows, length, hidden], on any device and in any float dtype
    side    what the model is given beside its tokens and differs by row: name of the argument
            (attention_mask, position_ids) → tensor [rows, ...]. Where it is empty, rows are whole:
            no padding, positions from 0
    made_of what they were made from, as `activations` names it; None where nobody knows
    handed  what units before hand to later blocks beside them: name, as in `handed` → tensor
            [rows, ...]
    """

    hidden: Tensor
    side: Mapping[str, Tensor] = field(default_factory=dict)
    made_of: str | None = None
    handed: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.hidden.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Some rows, [n, length, hidden]."""
        return self.hidden[start:stop]

    def write(self, start: int, rows: Tensor) -> None:
        """Put rows [n, length, hidden] in place of those from `start` on."""
        self.hidden[start : start + rows.shape[0]] = rows.to(self.hidden.dtype)

    def beside(self, start: int, stop: int) -> dict[str, Tensor]:
        """What those rows have beside them."""
        return {n: tensor[start:stop] for n, tensor in (*self.side.items(), *self.handed.items())}

    def copy(self) -> Stream:
        """The same rows once more."""
        return Stream(self.hidden.clone(), self.side, self.made_of, self.handed)

    def take(self, other: Stream) -> None:
        """Be what another stream is."""
        self.hidden, self.side, self.made_of = other.hidden, other.side, other.made_of
        self.handed = other.handed

    def like(self) -> Stream:
        """A stream for as many rows, whose hidden states are not set."""
        return Stream(torch.empty_like(self.hidden), self.side)


class StoredRows:
    """Rows that lie on disk; those that are read next are read ahead.

    world  of so many ranks, which read them in turn
    """

    def __init__(self, store: ActivationStore, pool: ThreadPoolExecutor, world: int) -> None:
        self.store = store
        self._pool, self._world = pool, world
        self._ahead: dict[tuple[int, int], Future[Tensor]] = {}

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.store.rows

    def read(self, start: int, stop: int) -> Tensor:
        """Some rows, [n, length, hidden], on the CPU."""
        ahead = self._ahead.pop((start, stop), None)
        rows = self.store.read(range(start, stop)) if ahead is None else ahead.result()
        begin = min(start + (stop - start) * self._world, self.rows)
        after = begin, min(begin + stop - start, self.rows)
        self._ahead = {after: self._pool.submit(self.store.read, range(*after))}
        return rows

    def beside(self, start: int, stop: int) -> dict[str, Tensor]:
        """Nothing: rows are whole."""
        return {}


@contextmanager
def stored_rows(store: ActivationStore, ranks: Ranks = ALONE) -> Iterator[StoredRows]:
    """The rows of a file, to be run through a block within a `with`."""
    with ThreadPoolExecutor(1) as pool:
        yield StoredRows(store, pool, ranks.world)


class Filling:
    """Puts rows into a file; of several ranks that are given the same rows the leading one does."""

    def __init__(self, writer: Writer | None, ranks: Ranks) -> None:
        self._writer, self._ranks = writer, ranks

    def put(self, start: int, rows: Tensor) -> None:
        """Put rows [n, length, hidden] in place from `start` on."""
        if self._writer is not None:
            self._writer.put(start, rows)

    def content_hash(self) -> str:
        """The file's hash, once the `with` has ended; then it is there for all ranks."""
        return self._ranks.share("" if self._writer is None else self._writer.content_hash())


@contextmanager
def filling(store: ActivationStore, ranks: Ranks = ALONE) -> Iterator[Filling]:
    """A file that is filled within a `with`."""
    if not ranks.leads:
        yield Filling(None, ranks)
        return
    with store.writing() as writer:
        yield Filling(writer, ranks)
