"""Where attention's mass lies, and thresholds from it.

q [rows, heads, Tq, head_dim], the last Tq of the text; k [rows, kv_heads, T, head_dim].
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 256
"""Queries whose attention is in memory at a time, whole rows of it."""


def block_mass(q: Tensor, k: Tensor, *, block_size: int, scale: float | None = None) -> Tensor:
    """What blocks of queries attend to blocks of keys: full causal attention, summed over both,
    [rows, heads, query blocks, key blocks]. scale is 1/sqrt(head_dim) if not given."""
    (rows, heads, q_len, dim), k_len = q.shape, k.shape[2]
    first, blocks = (k_len - q_len) // block_size, -(-k_len // block_size)
    key = torch.arange(k_len, device=k.device)
    k = k.repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2)
    total = torch.zeros((rows, heads, blocks - first, blocks), device=q.device, dtype=torch.float32)
    of_key = (key // block_size).expand(rows, heads, QUERIES, k_len)
    for start in range(0, q_len, QUERIES):
        part = q[:, :, start : start + QUERIES]
        position = key[k_len - q_len + start :][: part.shape[2]]
        scores = (part @ k).float() * (dim**-0.5 if scale is None else scale)
        share = scores.masked_fill(key > position[:, None], -torch.inf).softmax(-1)
        by_block = share.new_zeros((*share.shape[:3], blocks))
        by_block.scatter_add_(-1, of_key[:, :, : share.shape[2]], share)
        total.index_add_(2, position // block_size - first, by_block)
    return total


def mass_threshold(mass: Tensor, sums: Tensor, *, coverage: float) -> Tensor:
    """XAttention's threshold of each head, [rows, heads]: the share of the estimated sums that
    blocks hold which are worth as much as the least of those that cover attention.

    mass: what blocks are attended to; sums: the same as estimated. Of a row of blocks the fewest
    that hold `coverage` of its mass are taken; the smallest estimate among them is the mark
    (profile_threshold.py of the released code).
    """
    heaviest, order = mass.sort(dim=-1, descending=True, stable=True)
    before = heaviest.cumsum(-1) - heaviest
    fewest = before < coverage * mass.sum(-1, keepdim=True)
    estimate = sums.gather(-1, order)
    mark = estimate.masked_fill(~fewest, torch.inf).amin(-1, keepdim=True)
    held = torch.where(sums >= mark, sums, 0).sum((-1, -2))
    return held / sums.sum((-1, -2)).clamp(min=1e-8)
