"""Fits the weights of a block to what the original makes of its inputs, step by step."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor
from compressor.ranks.ranks import Ranks
from compressor.runner.tunable_block import Folding, TunableBlock

T = TypeVar("T")

TOLD = 20
"""Steps between two reports of progress."""


class Rounding(Protocol):
    """One weight's codes and grid as functions of parameters."""

    def weight(self) -> Tensor:
        """What they stand for, [out, in], differentiable."""

    def parameters(self) -> list[Tensor]:
        """What is learned of them."""

    def quantized(self) -> QTensor:
        """The codes and the grid."""


class ScaledRounding(Folding, Rounding, Protocol):
    """One whose scales alone move; what is folded of a gradient is that of its scales.

    logs  its parameters
    """

    logs: Tensor

    def scales_made(self) -> Tensor:
        """The scales as they stand, differentiable."""


class Step(NamedTuple):
    """A step's number, and the loss of its rows before it changed anything."""

    number: int
    loss: float


def draws(rows: Sequence[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """So many of the rows at a time, all of them once before one comes again; the last ones of a
    round that are fewer are left out, as in AutoRound."""
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - size + 1, size):
            yield [rows[i] for i in order[start : start + size]]


@dataclass(frozen=True, slots=True)
class Division:
    """Which rank learns which of a block's linears. All of them run rows of the block, and so need
    all weights.

    owners  rank of each linear, by its module path; empty where every rank learns all of them
    """

    ranks: Ranks
    owners: Mapping[str, int]

    @classmethod
    def none(cls, ranks: Ranks) -> Self:
        """Where all learn the same."""
        return cls(ranks, {})

    @classmethod
    def of(cls, linears: Sequence[Linear], ranks: Ranks) -> Self:
        """By size."""
        owned = ranks.owners(linears, lambda x: math.prod(x.shape))
        return cls(ranks, {x.name: rank for x, rank in zip(linears, owned, strict=True)})

    def mine(self, linear: Linear) -> bool:
        """Whether this rank learns it."""
        return self.owners.get(linear.name, self.ranks.rank) == self.ranks.rank

    def every(self, mine: Mapping[str, T]) -> dict[str, T]:
        """What ranks have of their linears, by module path, of all of them."""
        if not self.owners:
            return dict(mine)
        gathered = self.ranks.gather(dict(mine))
        return {name: gathered[rank][name] for name, rank in self.owners.items()}


@torch.no_grad()
def loss_of(
    block: TunableBlock,
    roundings: Mapping[str, Rounding],
    rows: Sequence[int],
    division: Division,
) -> float:
    """The block's loss on some rows."""
    return block.loss(division.every(_in_memory(block, _weights_of(roundings))), rows)


def _weights_of(roundings: Mapping[str, Rounding]) -> dict[str, Tensor]:
    """Module path → what its codes stand for."""
    return {name: rounding.weight() for name, rounding in roundings.items()}


def _in_memory(block: TunableBlock, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the block has them when it runs."""
    return {name: weight.detach().to(block.dtype) for name, weight in weights.items()}


def steps(
    block: TunableBlock,
    roundings: Mapping[str, Rounding],
    update: Callable[[int], None],
    *,
    count: int,
    batches: Iterator[list[int]],
    division: Division,
    progress: Callable[[int, int, float], None],
) -> Iterator[Step]:
    """Steps of a fit. It ends early where a loss is not finite.

    roundings  of the linears that this rank learns
    update     changes the parameters by their gradients, given the number of the step
    """
    parameters = [p for rounding in roundings.values() for p in rounding.parameters()]
    for number in range(count):
        for parameter in parameters:
            parameter.grad = None
        weights = _weights_of(roundings)
        every = division.every(_in_memory(block, weights))
        rows, owners = next(batches), list(division.owners.values())
        loss, gradients = block.loss_and_gradients(every, rows, owners)
        del every
        if number % TOLD == 0:
            progress(number, count, loss)
        yield Step(number, loss)
        if not math.isfinite(loss):
            return
        made = list(weights.values())
        if made:  # with more ranks than linears some learn none
            grads = [g.to(w.dtype) for g, w in zip(gradients, made, strict=True)]
            torch.autograd.backward(made, grads)
        with torch.no_grad():
            update(number)


def scale_steps(
    block: TunableBlock,
    roundings: Mapping[str, ScaledRounding],
    update: Callable[[int], None],
    *,
    count: int,
    batches: Iterator[list[int]],
    progress: Callable[[int, int, float], None],
) -> Iterator[int]:
    """The numbers of a fit's steps in which scales alone move, before each changes anything. Every
    rank learns all of them: ranks send each other what is left of gradients, and no weights. It
    may end early where a loss is not finite."""
    for number in range(count):
        made = [rounding.scales_made() for rounding in roundings.values()]
        for rounding in roundings.values():
            rounding.logs.grad = None
        loss, gradients = block.loss_and_folded(roundings, next(batches))
        if number % TOLD == 0:
            progress(number, count, float(loss))
            if not math.isfinite(loss):
                return
        yield number
        torch.autograd.backward(made, gradients)
        with torch.no_grad():
            update(number)


class Kept:
    """Copies of parameters at their best."""

    def __init__(self, roundings: Mapping[str, Rounding]) -> None:
        self._parameters = [p for rounding in roundings.values() for p in rounding.parameters()]
        self.copies = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are."""
        for copy, parameter in zip(self.copies, self._parameters, strict=True):
            copy.copy_(parameter)

    @torch.no_grad()
    def restore(self, copies: Sequence[Tensor] | None = None) -> None:
        """Set them to what was remembered, or to what another rank remembers."""
        for copy, parameter in zip(copies or self.copies, self._parameters, strict=True):
            parameter.copy_(copy)
