"""MoBA (arXiv 2502.13189): each query of each head attends to the blocks whose mean keys it likes
best, its own among them; and the way of FlashMoBA (arXiv 2511.11571) to compute it with small
blocks: queries are gathered by the blocks that they chose, so that each block is read once.

The gate is q · mean key in fp32, unscaled; the mean of an unfinished last block is over its tokens.

Layouts: q [B, H, Tq, D], the last Tq of the text, k and v [B, G, T, D], blocks int32 [B, H, Tq, K]
ascending and then -1, as `block_selection` gives them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from compressor_kernels.attention.block_selection import BlockRule, top_blocks, top_blocks_ref
from compressor_kernels.triton.launch import LOG2_E, dense, pow2, score_scale

HELD = 2**30
"""Bytes of partial results that are held at a time."""
TALLIED = 2048
"""Choices whose places among those of the same block are counted together."""


@dataclass(frozen=True, slots=True)
class RouteTiles:
    """`rows` of the queries of a block meet its keys together, `span` of them in one program."""

    rows: int = 64
    span: int = 1024
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class Routed:
    """Queries by the blocks that they chose.

    entries  int32 [B, H, Tq * K]: query * K + slot, by block; anything after the last
    offsets, counts  int32 [B, H, blocks]: where a block's queries begin, and how many they are
    """

    entries: Tensor
    offsets: Tensor
    counts: Tensor


def mean_keys(k: Tensor, *, block_size: int) -> Tensor:
    """Mean key of every block, fp32 [B, G, blocks, D]."""
    from compressor_kernels.attention import block_routing_jit as jit

    k = dense(k)
    batch, groups, tokens, dim = k.shape
    blocks = -(-tokens // block_size)
    out = torch.empty((batch, groups, blocks, dim), dtype=torch.float32, device=k.device)
    if out.numel():
        jit.mean_kernel[(blocks, batch * groups)](
            k,
            out,
            tokens,
            groups,
            *k.stride()[:3],
            BLOCK=block_size,
            D=dim,
            ROWS=min(64, pow2(block_size)),
            BLOCK_D=pow2(dim),
            num_warps=4,
        )
    return out


def mean_keys_ref(k: Tensor, *, block_size: int) -> Tensor:
    """Mean key of every block, fp32 [B, G, blocks, D] (fp64 for fp64 keys)."""
    tokens = k.shape[2]
    wide = k.to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    blocks = pad(wide, (0, 0, 0, -tokens % block_size)).unflatten(2, (-1, block_size))
    sizes = torch.full((blocks.shape[2], 1), float(block_size), device=k.device)
    sizes[-1] -= -tokens % block_size
    return blocks.sum(3) / sizes


def gates_ref(q: Tensor, means: Tensor) -> Tensor:
    """q · mean key, [B, H, Tq, blocks]."""
    group = q.shape[1] // means.shape[1]
    return q.to(means.dtype) @ means.repeat_interleave(group, dim=1).transpose(-1, -2)


def gated_blocks_ref(
    q: Tensor, means: Tensor, rule: BlockRule, *, tokens: int, behind: int = 0
) -> Tensor:
    """Blocks of each query by `gates_ref`, int32 [B, H, Tq, K]."""
    return top_blocks_ref(gates_ref(q, means), rule, tokens=tokens, behind=behind)


def gated_blocks(q: Tensor, means: Tensor, rule: BlockRule, *, tokens: int) -> Tensor:
    """`gated_blocks_ref` without storing a gate, unless first or local blocks are forced."""
    from compressor_kernels.attention import block_routing_jit as jit

    (batch, heads, q_len, dim), blocks = q.shape, means.shape[2]
    k = min(rule.top_k, blocks)
    if rule.init_blocks or rule.local_blocks or not rule.own_block or k > 32:
        return top_blocks(gates_ref(q, means), rule, tokens=tokens)
    q, means = dense(q), means.to(q.dtype).contiguous()
    out = torch.empty((batch, heads, q_len, k), dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    rows = max(16, min(128, pow2(q_len)))
    jit.gate_kernel[(-(-q_len // rows), batch * heads)](
        q,
        means,
        out,
        q_len,
        tokens,
        blocks,
        heads,
        *q.stride()[:3],
        GROUP=heads // means.shape[1],
        BLOCK=rule.block_size,
        K=k,
        K_POW2=max(2, pow2(k)),
        D=dim,
        ROWS=rows,
        CHUNK=max(16, min(128, pow2(blocks))),
        BLOCK_D=max(16, pow2(dim)),
        num_warps=8 if rows == 128 else 4,
        num_stages=2,
    )
    return out


def route(blocks: Tensor, count: int) -> Routed:
    """Queries by block, of `count` blocks. Of the queries of a block those of a run of `TALLIED`
    choices come in any order."""
    from compressor_kernels.attention import block_routing_jit as jit

    blocks = blocks.contiguous()
    batch, heads, choices = *blocks.shape[:2], blocks.shape[2] * blocks.shape[3]
    lanes, runs = batch * heads, -(-choices // TALLIED)
    tally = torch.zeros((lanes, count, runs), dtype=torch.int32, device=blocks.device)
    ranks, entries = (
        torch.empty((batch, heads, choices), dtype=torch.int32, device=blocks.device)
        for _ in range(2)
    )
    where = {"PER": TALLIED, "num_warps": 8}
    jit.rank_kernel[(runs, lanes)](blocks, tally, ranks, choices, count, **where)
    # One scan over everything, whose rows then begin at 0.
    starts = (tally.flatten().cumsum(0, dtype=torch.int32).view(tally.shape) - tally).contiguous()
    jit.place_kernel[(runs, lanes)](blocks, starts, ranks, entries, choices, count, **where)
    shape = (batch, heads, count)
    offsets = (starts[..., 0] - starts[:, :1, 0]).view(shape).contiguous()
    return Routed(entries, offsets, tally.sum(-1, dtype=torch.int32).view(shape))


def route_ref(blocks: Tensor, count: int) -> Routed:
    """`route` by a stable sort: a block's queries ascend, and those without a block come last."""
    batch, heads = blocks.shape[:2]
    chosen = torch.where(blocks < 0, count, blocks).flatten(2)
    ordered, entries = chosen.sort(dim=-1, stable=True)
    edges = torch.arange(count + 1, dtype=chosen.dtype, device=blocks.device)
    starts = torch.searchsorted(ordered, edges.expand(batch, heads, -1).contiguous()).int()
    return Routed(entries.int(), starts[..., :-1].contiguous(), starts.diff(dim=-1))


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    tiles: RouteTiles | None = None,
) -> Tensor:
    """Attention over chosen blocks, one choice for each query head, [B, H, Tq, D] in q's dtype;
    `block_attention_ref` says what it is. block_size: a multiple of 16. The same inputs give the
    same bits: a query's result over a block does not depend on the rows beside it, and blocks are
    merged in the order of its choice."""
    from compressor_kernels.attention import block_routing_jit as jit

    (batch, heads, q_len, dim), (groups, tokens) = q.shape, k.shape[1:3]
    if blocks.shape[:3] != q.shape[:3] or block_size % 16:
        raise ValueError(
            f"blocks {tuple(blocks.shape)} of {block_size} do not fit {tuple(q.shape)}"
        )
    q, k, v = dense(q), dense(k), dense(v)
    chosen, count = blocks.shape[3], -(-tokens // block_size)
    out = torch.empty((batch, heads, q_len, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    tiles = tiles or RouteTiles()
    step = max(1, HELD // max(1, batch * q_len * chosen * dim * q.element_size()))
    spans = count + -(-q_len * chosen // tiles.span)
    number = torch.arange(spans, device=q.device)
    for first in range(0, heads, step):
        some = slice(first, min(first + step, heads))
        routed = route(blocks[:, some], count)
        here = routed.entries.shape[1]
        lanes = batch * here
        ends = (-(-routed.counts // tiles.span)).cumsum(-1, dtype=torch.int32)
        numbers = number.to(torch.int32).expand(*ends.shape[:2], -1).contiguous()
        # `count`: nothing to do
        of_block = torch.searchsorted(ends, numbers, right=True, out_int32=True)
        part = torch.empty((lanes, q_len * chosen, dim), dtype=q.dtype, device=q.device)
        lse = torch.full(part.shape[:2], -1.0e30, dtype=torch.float32, device=q.device)
        jit.gather_kernel[(spans, lanes)](
            q,
            k,
            v,
            routed.entries,
            routed.offsets,
            routed.counts,
            ends,
            of_block,
            part,
            lse,
            q_len,
            tokens,
            count,
            first,
            here,
            score_scale(scale, dim) * LOG2_E,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            GROUP=heads // groups,
            K=chosen,
            BLOCK=block_size,
            BLOCK_N=min(128 if dim <= 128 else 64, block_size & -block_size),
            ROWS=tiles.rows,
            SPAN=tiles.span,
            D=dim,
            BLOCK_D=max(16, pow2(dim)),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        jit.merge_kernel[(-(-q_len // 16), lanes)](
            part,
            lse,
            out,
            q_len,
            heads,
            first,
            here,
            K=chosen,
            D=dim,
            ROWS=16,
            BLOCK_D=max(16, pow2(dim)),
            num_warps=4,
        )
    return out


def convolved_keys(k: Tensor, weight: Tensor) -> Tensor:
    """k + SiLU of a causal convolution over tokens, each channel by itself; for routing and for
    attention. weight [G * D, 1, W], the last of W for the token itself.

    FlashMoBA's paper names it; no code of it was found, so whether keys are rotated before is not
    known: here they are what attention is given.
    """
    batch, groups, tokens, dim = k.shape
    flat = k.transpose(2, 3).reshape(batch, groups * dim, tokens)
    mixed = conv1d(pad(flat, (weight.shape[2] - 1, 0)), weight.to(k.dtype), groups=groups * dim)
    return k + silu(mixed).view(batch, groups, dim, tokens).transpose(2, 3)
