"""Fits the weights of a block to what the original makes of its inputs, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compressor.ir.qtensor import QTensor
from compressor.runner.tunable_block import TunableBlock

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


def weights_of(roundings: Mapping[str, Rounding]) -> dict[str, Tensor]:
    """Module path → what its codes stand for."""
    return {name: rounding.weight() for name, rounding in roundings.items()}


@torch.no_grad()
def loss_of(block: TunableBlock, roundings: Mapping[str, Rounding], rows: Sequence[int]) -> float:
    """The block's loss on some rows."""
    return block.loss(weights_of(roundings), rows)


def steps(
    block: TunableBlock,
    roundings: Mapping[str, Rounding],
    update: Callable[[int], None],
    *,
    count: int,
    batches: Iterator[list[int]],
    progress: Callable[[int, int, float], None],
) -> Iterator[Step]:
    """Steps of a fit. It ends early where a loss is not finite.

    update  changes the parameters by their gradients, given the number of the step
    """
    parameters = [p for rounding in roundings.values() for p in rounding.parameters()]
    for number in range(count):
        for parameter in parameters:
            parameter.grad = None
        weights = weights_of(roundings)
        found, gradients = block.loss_and_gradients(weights, next(batches))
        loss = float(found)
        if number % TOLD == 0:
            progress(number, count, loss)
        yield Step(number, loss)
        if not math.isfinite(loss):
            return
        made = list(weights.values())
        torch.autograd.backward(made, [g.to(w.dtype) for g, w in zip(gradients, made, strict=True)])
        with torch.no_grad():
            update(number)


class Kept:
    """Copies of parameters at their best."""

    def __init__(self, roundings: Mapping[str, Rounding]) -> None:
        self._parameters = [p for rounding in roundings.values() for p in rounding.parameters()]
        self._copies = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are."""
        torch._foreach_copy_(self._copies, self._parameters)

    @torch.no_grad()
    def restore(self) -> None:
        """Set them to what was remembered."""
        torch._foreach_copy_(self._parameters, self._copies)
