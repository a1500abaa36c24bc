"""Experts of a block that do not fit beside each other: the weights of some at a time are on the
device, whenever they are needed."""

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
    experts  those that are here: all, unless other ranks have some
    size     experts of a group
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Callable[[range], Mapping[str, Tensor]],
        *,
        experts: range,
        size: int,
    ) -> None:
        self.module, self.weights = module, weights
        self.experts, self.size = experts, size
        self._held: tuple[range, Any] | None = None

    def __iter__(self) -> Iterator[range]:
        """The experts of each group."""
        starts = range(0, len(self.experts), self.size)
        return (self.experts[first : first + self.size] for first in starts)

    def holding(self, expert: int) -> tuple[Any, int]:
        """A module of the experts of an expert's group, and its place among them. Another group's
        is to be let go first, or both are in memory."""
        place = self.experts.index(expert)
        first = place - place % self.size
        some = self.experts[first : first + self.size]
        if self._held is None or self._held[0] != some:
            self._held = None  # before the next is made
            self._held = some, with_experts(self.module, self.weights(some))
        return self._held[1], place - first


def with_experts(module: nn.Module, stacks: Mapping[str, Tensor]) -> Any:
    """A module of experts for those in other stacks, by the names of its parameters."""
    few: Any = copy.copy(module)
    vars(few).pop("forward", None)  # what runs them otherwise
    few._parameters = {n: nn.Parameter(t, requires_grad=False) for n, t in stacks.items()}
    few.num_experts = len(next(iter(stacks.values())))
    return few
