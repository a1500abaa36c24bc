"""One call of a block's attention, and what may stand in its place in an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class PlainAttention(Protocol):
    """A model's own attention under its own scaling and caps."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """[rows, length, heads, head_dim]; `mask` [rows or 1, heads or 1, length, keys] takes the
        place of the model's own where it is given."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a block's attention is asked, after the rotary embedding and before heads are repeated.

    layer    index of the block
    query    [rows, heads, length, head_dim]
    key      [rows, kv_heads, length, head_dim];  value  the same shape
    mask     additive or boolean mask [1, 1, length, length], or None for plain causal attention
    scaling  factor of the products of query and key
    plain    the model's own attention of (query, key, value) under the same mask, scaling and caps
    rotary   cosine and sine [length, channels] of the rotary embedding by position, or None
    hidden   what enters the attention, [rows, length, hidden], or None where that is not known
    first_row  number of the first of these rows among all that are run
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    plain: PlainAttention
    rotary: tuple[Tensor, Tensor] | None = None
    hidden: Tensor | None = None
    first_row: int = 0


AttentionHook = Callable[[AttentionCall], Tensor]
"""Gives the attention's output [rows, length, heads, head_dim] for one call."""
