"""Linears of one shape that become the same, such as experts': worked on as one stack of weights,
so that thousands of small tensors are a few large ones."""

from __future__ import annotations

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
        out_features, in_features = same[0].shape
        size = max(1, min(-(-len(same) // STACKS), LARGEST // (out_features * in_features)))
        found += [tuple(same[first : first + size]) for first in range(0, len(same), size)]
    return found


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first dimension; a single one is not copied."""
    return weights[0][None] if len(weights) == 1 else torch.stack(list(weights))
