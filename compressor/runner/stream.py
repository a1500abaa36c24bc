"""Rows of hidden states on their way through a model's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from compressor_calibration.store import ActivationStore
from torch import Tensor


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
    handed  what the block before hands to the next beside them: name of the argument → tensor
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
    """Rows that lie on disk; those after the ones that are read are read ahead."""

    def __init__(self, store: ActivationStore, pool: ThreadPoolExecutor) -> None:
        self.store = store
        self._pool = pool
        self._ahead: dict[tuple[int, int], Future[Tensor]] = {}

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.store.rows

    def read(self, start: int, stop: int) -> Tensor:
        """Some rows, [n, length, hidden], on the CPU."""
        ahead = self._ahead.pop((start, stop), None)
        rows = self.store.read(range(start, stop)) if ahead is None else ahead.result()
        after = stop, min(2 * stop - start, self.rows)
        self._ahead = {after: self._pool.submit(self.store.read, range(*after))}
        return rows

    def beside(self, start: int, stop: int) -> dict[str, Tensor]:
        """Nothing: rows are whole."""
        return {}


@contextmanager
def stored_rows(store: ActivationStore) -> Iterator[StoredRows]:
    """The rows of a file, to be run through a block within a `with`."""
    with ThreadPoolExecutor(1) as pool:
        yield StoredRows(store, pool)
