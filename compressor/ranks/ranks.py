"""The processes that work on one run: who computes what, and how all of them come to know it.

Rows of tokens are divided in chunks of one forward pass each, dealt out in turn. What a chunk adds
to a sum is added in the chunks' order, whoever ran them, so that every sum has the bits that one
process gives it. Searches and roundings are divided whole, by linear, expert or candidate.

`Ranks` itself is one process alone, where all of it is nothing; `group.Group` are several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from compressor.ranks.divide import owners

I = TypeVar("I")
T = TypeVar("T")


class AgreedShortage(torch.OutOfMemoryError):
    """Some rank's device has too little memory, as all of them know."""


class Form(NamedTuple):
    """A tensor but for how many rows it is of: [per_row · rows, *shape], or [*shape] of all of
    them where `per_row` is 0."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    per_row: int

    @classmethod
    def of(cls, tensor: Tensor, rows: int) -> Form:
        """That of a tensor of so many rows; one with a single dimension is of all of them."""
        if tensor.dim() < 2:
            return cls(tensor.dtype, tuple(tensor.shape), 0)
        return cls(tensor.dtype, tuple(tensor.shape[1:]), tensor.shape[0] // rows)

    def whole(self, rows: int) -> tuple[int, ...]:
        """Its shape."""
        return (self.per_row * rows, *self.shape) if self.per_row else self.shape

    def nbytes(self, rows: int) -> int:
        """Its size."""
        return math.prod(self.whole(rows)) * self.dtype.itemsize

    def within(self, data: Tensor, rows: int) -> Tensor:
        """The tensor that begins where these bytes begin."""
        return data[: self.nbytes(rows)].view(self.dtype).view(self.whole(rows))


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of a run.

    rank   its number;  world  how many there are
    Methods that move something are called by all ranks alike, in the same order.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes, and speaks."""
        return self.rank == 0

    def rows(self, count: int, batch: int) -> list[int]:
        """This rank's rows of `count`, in chunks of `batch` that are dealt out in turn."""
        starts = range(self.rank * batch, count, self.world * batch)
        return [row for start in starts for row in range(start, min(start + batch, count))]

    def own(self, count: int) -> range:
        """This rank's share of `count` equal pieces of work."""
        return range(self.rank, count, self.world)

    def owners(
        self,
        items: Sequence[I],
        cost: Callable[[I], float],
        home: Callable[[I], int | None] = lambda item: None,
    ) -> list[int]:
        """The rank to which `each` gives each of the items."""
        return owners([cost(item) for item in items], self.world, [home(item) for item in items])

    def mine(
        self,
        items: Sequence[I],
        cost: Callable[[I], float],
        home: Callable[[I], int | None] = lambda item: None,
    ) -> list[I]:
        """The items that `each` gives to this rank."""
        given = zip(items, self.owners(items, cost, home), strict=True)
        return [item for item, rank in given if rank == self.rank]

    def each(
        self,
        items: Sequence[I],
        work: Callable[[I], T],
        cost: Callable[[I], float] = lambda item: 1.0,
        home: Callable[[I], int | None] = lambda item: None,
    ) -> list[T]:
        """What `work` makes of each item, in their order; each is computed by one rank.

        cost  of an item, in any unit, by which they are divided: the same on every rank
        home  the rank that an item is at, if it is at one alone: what is made of it stays there,
              and others get tensors on the meta device in the place of those in it
        """
        return [work(item) for item in items]

    def led(self, work: Callable[[], T]) -> T:
        """What `work` gives on the rank that leads; an error there is one everywhere."""
        return work()

    def gathered(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, in their order; an error on one is one everywhere."""
        return [work()]

    def share(self, value: T) -> T:
        """The leading rank's value, which may hold tensors."""
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        return [value]

    def send(self, value: Any, to: int) -> Callable[[], None]:
        """Give one other rank a value of which all tensors are on the CPU; the function that this
        returns waits until it has arrived."""
        raise NotImplementedError("there is no other rank")

    def receive(self, source: int) -> Any:
        """What another rank sends."""
        raise NotImplementedError("there is no other rank")

    def agree(self, value: int, what: str) -> None:
        """Raises MachineError where ranks have different values: they would wait for each other
        for ever."""

    def gather_rows(
        self, tensors: Sequence[Tensor], rows: Sequence[int], forms: list[Form]
    ) -> Callable[[], list[list[Tensor]]]:
        """A function that gives the tensors of every rank that has rows, in the order of ranks,
        once they are needed: they are on their way meanwhile.

        tensors  alike on all ranks but for the first dimension, which grows with a rank's rows,
                 unless it is the only one
        rows     of every rank; the leading one has some
        forms    of the tensors; empty at first, and then the same list while they stay the same
        """
        return lambda: [list(tensors)]

    def join_rows(self, tensor: Tensor, batch: int) -> Tensor:
        """All rows [count, ...] in their order, of which each rank has those that `rows` gave it
        for the same `batch`; on the CPU."""
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds every rank's values, in place; exact where only one rank's are not zero."""
        return tensor

    def beside(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor [world, ...]; all are on the device and of one shape and dtype. No
        processor waits for it."""
        return tensor[None]

    def swapped(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """What every rank has for this one, in the order of ranks.

        parts   for each rank, of one dtype on the device; alike but for the first dimension
        counts  how large that of what each rank sends here is
        """
        return list(parts)

    def summed(
        self,
        parts: Iterable[Sequence[Tensor]],
        count: int,
        like: Sequence[Tensor],
        to: Sequence[int],
    ) -> list[Tensor]:
        """Sums over parts of several tensors each, in the order of the parts and in the tensors'
        own dtype; those of the tensors that are this rank's.

        parts  that this rank has, of `count` that are dealt out in turn; one of them is made, and
               in memory, at a time
        like   tensors of one dtype and their shapes;  to  the rank that each is for
        Raises torch.OutOfMemoryError on all ranks where making a part does on one.
        """
        totals: list[Tensor] = []
        for part in parts:
            for total, tensor in zip(totals, part, strict=False):
                total += tensor
            totals = totals or [
                tensor.clone(memory_format=torch.contiguous_format) for tensor in part
            ]
        return totals

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest of every rank's values, in place."""
        return tensor

    def numbers(self, *values: int) -> list[tuple[int, ...]]:
        """A few small numbers of every rank, in the order of ranks; quick."""
        return [values]

    def any(self, flag: bool) -> bool:
        """Whether some rank says so."""
        return flag

    def leading(self, context: AbstractContextManager[T]) -> AbstractContextManager[T]:
        """A context that only the leading rank enters; all get what it gives."""
        return context

    def barrier(self) -> None:
        """Wait for all."""


ALONE = Ranks()
