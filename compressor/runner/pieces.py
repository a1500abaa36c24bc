"""Losses of rows and their gradients, of which the sums do not depend on who computes them.

Rows run in pieces whose size does not depend on the number of ranks. Ranks share the pieces, and
what comes of them is added up in their order. Whatever trains anything goes through here.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressor.ranks.ranks import AgreedShortage, Ranks

T = TypeVar("T")
Piece = Sequence[int]
"""Some of the rows."""
Part = tuple[Tensor, Sequence[Tensor]]
"""A piece's loss, or several of them [k], and a gradient for every parameter."""

UNREPEATABLE = "gradients were summed in no fixed order: another run may write other bytes"
"""What a report says where that was so."""

PIECES = 4
"""Into how many pieces rows are divided at least, where there are as many."""


def pieces_of(rows: Sequence[int], most: int) -> list[Piece]:
    """The rows in order, at most so many at a time, in several pieces where there are as many."""
    size = min(most, -(-len(rows) // PIECES))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass(slots=True)
class Pieces:
    """Runs pieces of rows on ranks that all have the rows.

    repeatable  whether all that ran on a GPU so far has kernels whose sums have one order; where
                something has none, another run may come to other bits
    All methods raise torch.OutOfMemoryError on all ranks where one of them is short of memory.
    """

    ranks: Ranks
    device: torch.device
    repeatable: bool = True

    @torch.no_grad()
    def losses(self, pieces: Sequence[Piece], loss: Callable[[Piece], Tensor]) -> list[float]:
        """The sum of the losses of all pieces, in float64; of each of them, where a piece has
        several, [k]."""
        found: list[Tensor] | None = None
        try:
            found = [self._in_order(partial(loss, piece)) for piece in self._mine(pieces)]
        except torch.OutOfMemoryError:
            if self.ranks.world == 1:
                raise
        return self._summed(found, len(pieces))

    def own_gradients(
        self,
        pieces: Sequence[Piece],
        work: Callable[[Piece], Part],
        like: Sequence[Tensor],
        owners: Sequence[int],
    ) -> tuple[list[float], list[Tensor]]:
        """`losses`, and the sums of the gradients of those parameters that are this rank's.

        like    the parameters;  owners  the rank of each
        """
        losses: list[Tensor] = []

        def gradients() -> Iterator[Sequence[Tensor]]:
            for piece in self._mine(pieces):
                loss, found = self._in_order(partial(work, piece))
                losses.append(loss.detach())
                yield found

        with torch.enable_grad():
            sums = self.ranks.summed(gradients(), len(pieces), like, owners)
        return self._summed(losses, len(pieces)), sums

    def gradients(
        self,
        pieces: Sequence[Piece],
        work: Callable[[Piece], Part],
        like: Sequence[Tensor],
    ) -> tuple[list[float], list[Tensor]]:
        """`losses`, and the sums of the gradients of all parameters, on every rank."""
        owners = self.ranks.owners(like, lambda tensor: tensor.numel())
        losses, own = self.own_gradients(pieces, work, like, owners)
        every = [iter(found) for found in self.ranks.gather(own)]
        return losses, [next(every[owner]) for owner in owners]

    def vectors(
        self,
        pieces: Sequence[Piece],
        work: Callable[[Piece], Tensor],
        width: int,
        *,
        settled: Callable[[], bool],
        certain: bool,
    ) -> tuple[Tensor, bool]:
        """The sum over all pieces, in their order, of what `work` makes of each, float32 [width],
        on every rank; and whether every rank has settled.

        settled  whether this one's work takes no more memory from now on
        certain  that all have: then no rank asks the others whether theirs was enough, and none
                 waits for its device
        """
        most, short = -(-len(pieces) // self.ranks.world), False
        found = torch.zeros(most, width, device=self.device)
        try:
            for place, piece in zip(found, self._mine(pieces), strict=False):
                place.copy_(self._in_order(partial(work, piece)))
        except torch.OutOfMemoryError:
            if self.ranks.world == 1 or certain:
                raise
            short = True
        if not certain and self.ranks.world > 1:
            said = self.ranks.numbers(int(short), int(settled()))
            if any(lacks for lacks, _ in said):
                raise AgreedShortage
            certain = all(done for _, done in said)
        every = self.ranks.beside(found)
        world, total = self.ranks.world, every[0, 0].clone()
        for number in range(1, len(pieces)):
            total += every[number % world, number // world]
        return total, certain

    def _mine(self, pieces: Sequence[Piece]) -> list[Piece]:
        return [pieces[i] for i in self.ranks.own(len(pieces))]

    def _summed(self, found: list[Tensor] | None, count: int) -> list[float]:
        """The sums over all pieces of which this rank found its own; None where it could not."""
        mine = None if found is None else [loss.double().reshape(-1).tolist() for loss in found]
        every: list[list[list[float]]] = []
        for one in self.ranks.gather(mine):
            if one is None:
                raise AgreedShortage
            every.append(one)
        world = self.ranks.world
        in_order = [every[number % world][number // world] for number in range(count)]
        return [sum(column) for column in zip(*in_order, strict=True)]

    def _in_order(self, work: Callable[[], T]) -> T:
        """What kernels give whose sums have one order, as far as what runs has such kernels."""
        try:
            with _one_order(self.device, strict=self.repeatable):
                return work()
        except RuntimeError as error:
            if not self.repeatable or "deterministic" not in str(error).lower():
                raise
        self.repeatable = False
        with _one_order(self.device, strict=False):
            return work()


@contextmanager
def _one_order(device: torch.device, *, strict: bool) -> Iterator[None]:
    """Kernels on a GPU whose sums have one order, for the length of a `with`.

    strict  what has no such kernel raises RuntimeError; where it may run all the same, attention
            takes its kernels that have none, too
    """
    if device.type != "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    # Not cuDNN's, whose gradients have no fixed order. The others keep one in strict mode.
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with warnings.catch_warnings(), sdpa_kernel(backends):
        warnings.simplefilter("ignore")  # what has no such kernel says so each time
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
