"""Experts of a block that do not fit beside each other: the weights of some at a time are on the
device, whenever they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from compressor.ir.layout import UnitLayout

WEIGHTS = 2**27
"""Weights of a group, unless one expert has more."""


def experts_at_once(unit: UnitLayout) -> int:
    """How many experts of a block have `WEIGHTS` together, at least one."""
    of_all = sum(x.out_features * x.in_features for x in unit.linears if x.expert is not None)
    return max(1, min(unit.experts, WEIGHTS * unit.experts // max(of_all, 1)))


class ExpertGroups:
    """The experts of a block, of which the last group that was asked for is in memory.

    module   transformers' module of all of them, without weights
    weights  experts → the module's parameters for them, by name
    size     experts of a group
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Callable[[range], Mapping[str, Tensor]],
        *,
        count: int,
        size: int,
    ) -> None:
        self.module, self.weights = module, weights
        self.count, self.size = count, size
        self._held: tuple[int, Any] | None = None

    def __iter__(self) -> Iterator[range]:
        """The experts of each group."""
        starts = range(0, self.count, self.size)
        return (range(first, min(first + self.size, self.count)) for first in starts)

    def holding(self, expert: int) -> tuple[Any, int]:
        """A module of the experts of an expert's group, and its place among them. Another group's
        is to be let go first, or both are in memory."""
        first = expert - expert % self.size
        if self._held is None or self._held[0] != first:
            self._held = None  # before the next is made
            some = range(first, min(first + self.size, self.count))
            self._held = first, with_experts(self.module, self.weights(some))
        return self._held[1], expert - first


class HeldExperts(ExpertGroups):
    """The only experts of a block that are here: other ranks have the others.

    stacks  the module's parameters for them, by name;  held  which they are
    """

    def __init__(self, module: nn.Module, stacks: Mapping[str, Tensor], held: range) -> None:
        super().__init__(module, lambda some: stacks, count=len(held), size=len(held))
        self.held = held
        self.own = with_experts(module, stacks)

    def __iter__(self) -> Iterator[range]:
        return iter([self.held])

    def holding(self, expert: int) -> tuple[Any, int]:
        """The module of them all, and an expert's place in it."""
        return self.own, expert - self.held.start


def with_experts(module: nn.Module, stacks: Mapping[str, Tensor]) -> Any:
    """A module of experts for those in other stacks, by the names of its parameters."""
    few: Any = copy.copy(module)
    vars(few).pop("forward", None)  # what runs them otherwise
    few._parameters = {n: nn.Parameter(t, requires_grad=False) for n, t in stacks.items()}
    few.num_experts = len(next(iter(stacks.values())))
    return few
