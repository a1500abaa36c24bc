"""Linears of one shape that become the same, such as experts': worked on as one stack of weights,
so that thousands of small tensors are a few large ones."""

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from compressor.ir.layout import Linear

Linears = tuple[Linear, ...]

STACKS = 16
"""Into about so many stacks experts of one shape are divided, more where they are large: ranks
share stacks."""
LARGEST = 2**26
"""Weights of a stack at most, unless a single linear has more."""


def of_one_shape(linears: Sequence[Linear], kind: Callable[[Linear], Hashable]) -> list[Linears]:
    """Linears in stacks, in the order of their first: experts of one shape and kind together, and
    every other linear by itself. They follow from names and shapes alone, so that they are the same
    for any number of ranks."""
    kinds: dict[Hashable, list[Linear]] = {}
    for linear in linears:
        alone = linear.name if linear.expert is None else ""
        kinds.setdefault((alone, linear.shape, kind(linear)), []).append(linear)
    found = []
    for same in kinds.values():
        size = max(1, min(-(-len(same) // STACKS), LARGEST // math.prod(same[0].shape)))
        found += [tuple(same[first : first + size]) for first in range(0, len(same), size)]
    return found


def groups_of_experts(linears: Sequence[Linear]) -> list[tuple[int, ...]]:
    """A block's experts in groups that no stack crosses, whatever its kind, so that each of several
    ranks may have some groups; in order."""
    of_experts = [x for x in linears if x.expert is not None]
    experts = sorted({x.expert for x in of_experts if x.expert is not None})
    kinds: list[Callable[[Linear], Hashable]] = [
        lambda x: None,
        lambda x: x.role == "expert.down",
        lambda x: x.role,
    ]
    joined: set[int] = set()  # with the one before
    for kind in kinds:
        for stack in of_one_shape(of_experts, kind):
            inside = [x.expert for x in stack if x.expert is not None]
            joined.update(range(min(inside) + 1, max(inside) + 1))
    found: list[list[int]] = []
    for expert in experts:
        if not found or expert not in joined:
            found.append([])
        found[-1].append(expert)
    return [tuple(group) for group in found]


def homes(linears: Sequence[Linear], world: int) -> dict[int, int]:
    """Which of `world` ranks has each expert of a block, where each has some of them alone; empty
    where that cannot be."""
    apart = groups_of_experts(linears)
    if not 1 < world <= len(apart):
        return {}
    return {e: i * world // len(apart) for i, group in enumerate(apart) for e in group}


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first dimension; a single one is not copied."""
    return weights[0][None] if len(weights) == 1 else torch.stack(list(weights))
