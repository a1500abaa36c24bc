"""The arithmetic of attention over what a cache holds, one class of heads at a time.

q [rows, heads, Tq, head_dim]; k and v [rows, kv_heads, Tk, head_dim]; all results [rows, heads, Tq,
head_dim]. A key is seen where the policy's token mask and the model's own window both allow it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from compressor.attention.policy import token_mask
from compressor.attention.rope import Rotary, rotated

QUERY_ROWS = 1024
"""Queries of a streaming head computed at a time: a prompt takes no memory of its square."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a model's own attention asks for.

    scaling  factor of the products;  softcap  bound of the logits, or None
    window   the model's own sliding window, or None
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None


def full(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Causal attention; the last query sits at the last key."""
    q_len, k_len = q.shape[2], k.shape[2]
    if rule.window is None and q_len in (1, k_len):
        return softmax_attention(q, k, v, None, rule, causal=q_len > 1)
    keys = torch.arange(k_len, device=q.device)
    distance = keys[k_len - q_len :, None] - keys[None, :]
    mask = distance >= 0
    if rule.window is not None:
        mask &= distance < rule.window
    return softmax_attention(q, k, v, mask, rule)


def streaming(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor, rule: Rule, *, sinks: int, window: int
) -> Tensor:
    """Streaming heads over the keys at `places` [Tk], which ascend; the last query is the last."""
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    old = k.shape[2] - q.shape[2]
    first = min(sinks, k.shape[2])
    for start in range(0, q.shape[2], QUERY_ROWS):
        stop = min(start + QUERY_ROWS, q.shape[2])
        # No query of this part sees a key, other than a sink, from before the first one's window.
        begin = max(first, old + start - window + 1)
        seen = [torch.arange(first), torch.arange(begin, max(begin, old + stop))]
        index = torch.cat(seen).to(q.device)
        at, own = places[index], places[old + start : old + stop]
        mask = token_mask(own, at, sinks=sinks, window=window)
        if rule.window is not None:
            mask &= own[:, None] - at[None, :] < rule.window
        out[:, :, start:stop] = softmax_attention(
            q[:, :, start:stop], k[:, :, index], v[:, :, index], mask, rule
        )
    return out


def by_slot(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    rule: Rule,
    rotary: Rotary,
    *,
    sinks: int,
    window: int,
) -> Tensor:
    """Streaming heads whose positions are cache slots; q and k are not rotated yet.

    A query stands at its rank among the keys it may see. For the recent keys of a chunk only their
    distance counts, so they take the slots in which they lie; for the sinks a query takes its rank.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    slots = torch.arange(k_len, device=q.device)
    own = places[k_len - q_len :]
    first = int((places < sinks).sum())
    cos, sin = rotary
    rank = own.clamp(max=sinks + window - 1)
    key = rotated(k, (cos[slots], sin[slots]))
    near = rotated(q, (cos[slots[k_len - q_len :]], sin[slots[k_len - q_len :]]))
    far = rotated(q, (cos[rank], sin[rank]))
    zeros = torch.zeros_like
    query = torch.cat([near, far], dim=-1)
    keys = torch.cat(
        [
            torch.cat([zeros(key[:, :, :first]), key[:, :, first:]], dim=2),
            torch.cat([key[:, :, :first], zeros(key[:, :, first:])], dim=2),
        ],
        dim=-1,
    )
    mask = token_mask(own, places, sinks=sinks, window=window)
    if rule.window is not None:
        mask &= own[:, None] - places[None, :] < rule.window
    return softmax_attention(query, keys, v, mask, rule)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, *, causal: bool = False
) -> Tensor:
    """Attention under a mask [rows or 1, heads or 1, Tq, Tk] or [Tq, Tk], or none."""
    group = q.shape[1] // k.shape[1]
    if rule.softcap is None:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=rule.scaling, enable_gqa=group > 1
        )
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * rule.scaling
    scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(q.dtype) @ v
