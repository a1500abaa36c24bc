"""Attention under masks, some queries at a time.

q [rows, heads, Tq, head_dim]; k and v [rows, kv_heads, Tk, head_dim]; all results [rows, heads, Tq,
head_dim].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PIECE_ELEMENTS = {"cuda": 2**25, "cpu": 2**23}
"""Scores of a piece of the queries that are in memory at a time, a few times over."""


@dataclass(frozen=True, slots=True)
class OwnAttention:
    """What a model's own attention asks for.

    scaling  factor of the products;  softcap  bound of the logits, or None
    window   the model's own sliding window, or None
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None


def full(q: Tensor, k: Tensor, v: Tensor, own: OwnAttention) -> Tensor:
    """Causal attention; the last query sits at the last key."""
    q_len, k_len = q.shape[2], k.shape[2]
    if own.window is None and q_len in (1, k_len):
        return softmax_attention(q, k, v, None, own, causal=q_len > 1)
    keys = torch.arange(k_len, device=q.device)
    distance = keys[k_len - q_len :, None] - keys[None, :]
    mask = distance >= 0
    if own.window is not None:
        mask &= distance < own.window
    return softmax_attention(q, k, v, mask, own)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: OwnAttention, *, causal: bool = False
) -> Tensor:
    """Attention under a mask [rows or 1, heads or 1, Tq, Tk] or [Tq, Tk], or none."""
    group = q.shape[1] // k.shape[1]
    if own.softcap is None:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=own.scaling, enable_gqa=group > 1
        )
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * own.scaling
    scores = torch.tanh(scores / own.softcap) * own.softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(q.dtype) @ v


def in_pieces(
    choose: Callable[[Tensor, int], Tensor], queries: Tensor, row_elements: int
) -> Tensor:
    """`choose(part, tokens behind it)` over parts of the queries [rows, heads, Tq, head_dim]."""
    q_len = queries.shape[2]
    most = PIECE_ELEMENTS.get(queries.device.type, PIECE_ELEMENTS["cuda"])
    size = max(1, most // (queries.shape[0] * row_elements))
    results = []
    for start in range(0, q_len, size):
        part = queries[:, :, start : start + size]
        results.append(choose(part, q_len - start - part.shape[2]))
    return results[0] if len(results) == 1 else torch.cat(results, dim=2)


def both_masks(own: Tensor | None, mask: Tensor) -> Tensor:
    """A model's own mask, additive or boolean or none, and a boolean one together."""
    if own is None:
        return mask
    if own.dtype == torch.bool:
        return own & mask
    return own.masked_fill(~mask, torch.finfo(own.dtype).min)
