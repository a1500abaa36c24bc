"""Attention of queries to their chosen key blocks alone: a step of decoding, or a prompt.

What InfLLM-V2, SparDA (arXiv 2606.04511) and Quest (arXiv 2406.10774) do once blocks are chosen
(`block_selection`): exact softmax attention, causal by token, over the tokens of the chosen blocks.
Queries of one set (the query heads of a KV head, or one query head) read its blocks together.

Layouts: q [B, H, Tq, D], k and v [B, G, T, D] with H a multiple of G, blocks int32 [B, S, Tq, K]
ascending and then -1, with S = G sets (one for each KV head) or S = H (one for each query head).
Queries are the last Tq tokens of the text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.attention.block_selection import positions
from compressor_kernels.attention.head_attention import softmax_attention_ref
from compressor_kernels.triton.launch import (
    LOG2_E,
    dense,
    launch_early,
    overlaps,
    pow2,
    ranges,
    score_scale,
)

TILE_TOKENS = 64
"""Most tokens of a tile of a prompt: each has a bit of an int64."""


@dataclass(frozen=True, slots=True)
class BlockTiles:
    """Tile shape of the kernels; `programs_per_sm` sets the number of splits of a decoding step,
    `rows` how many tokens times query heads of a set read a prompt's blocks together."""

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 4
    rows: int = 64


SINGLE = BlockTiles(block_n=16, num_warps=1, num_stages=4, programs_per_sm=8)
"""For blocks of one key: each row of keys has an address of its own."""


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    lengths: Tensor | None = None,
    tokens: int | None = None,
    scale: float | None = None,
    tiles: BlockTiles | None = None,
) -> Tensor:
    """Attention over chosen blocks, [B, H, Tq, D] in q's dtype.

    tokens: keys in the text if k has room for more; lengths int32 [B]: keys of each batch row if
    they differ. scale is 1/sqrt(D) if not given. Every query needs a block with a key at or before
    it. The same inputs give the same bits.
    """
    from compressor_kernels.attention import block_attention_jit as jit
    from compressor_kernels.attention.head_attention_jit import combine_kernel

    q, k, v = (dense(x) for x in (q, k, v))
    blocks = blocks.contiguous()
    tokens = k.shape[2] if tokens is None else tokens
    _check(q, k, v, blocks)
    tiles = tiles or (SINGLE if block_size == 1 else BlockTiles())
    (batch, heads, q_len, dim), groups = q.shape, k.shape[1]
    sets, chosen = blocks.shape[1], blocks.shape[3]
    group = heads // sets
    splits, most = 1, chosen * block_size // (2 * tiles.block_n)
    if q_len == 1:
        lanes, each = batch * sets, tiles.programs_per_sm
        splits = ranges(blocks, lanes=lanes, most=most, programs_per_sm=each)
    out = torch.empty((batch, heads, q_len, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    scale = score_scale(scale, dim) * LOG2_E
    if q_len > 1 and block_size >= 16 and block_size == pow2(block_size):
        where = {"block_size": block_size, "lengths": lengths, "tokens": tokens}
        _attend_tiles(q, k, v, blocks, out, **where, scale=scale, tiles=tiles)
        return out
    part = lse = None
    early = splits > 1 and overlaps(q)
    if splits > 1:
        part = torch.empty((batch, heads, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    jit.attend_kernel[(q_len * splits, batch * sets)](
        q,
        k,
        v,
        blocks,
        lengths,
        out,
        part,
        lse,
        tokens,
        q_len,
        sets,
        scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        GROUP=group,
        PER_KEY=sets // groups,
        K=chosen,
        BLOCK=block_size,
        D=dim,
        SPLITS=splits,
        BLOCK_G=max(16, pow2(group)),
        BLOCK_N=max(16, min(tiles.block_n, pow2(chosen * block_size))),
        BLOCK_D=max(16, pow2(dim)),
        EARLY=early,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        combine_kernel[(batch * heads,)](
            part,
            lse,
            None,
            out,
            sets,
            heads,
            D=dim,
            GROUP=group,
            SPLITS=splits,
            BLOCK_S=pow2(splits),
            BLOCK_D=pow2(dim),
            EARLY=early,
            num_warps=4,
            **launch_early(early),
        )
    return out


def _attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    *,
    block_size: int,
    lengths: Tensor | None,
    tokens: int,
    scale: float,
    tiles: BlockTiles,
) -> None:
    """Several neighbouring tokens of a prompt together: each block that any of them chose is read
    once, and hidden from those that did not choose it."""
    from compressor_kernels.attention import block_attention_jit as jit

    (batch, heads, q_len, dim), groups = q.shape, k.shape[1]
    sets, group_pow2 = blocks.shape[1], pow2(heads // blocks.shape[1])
    tile = max(1, min(TILE_TOKENS, tiles.rows // group_pow2))
    listed, bits, counts = tile_blocks(blocks, tile=tile, count=-(-tokens // block_size))
    jit.tile_kernel[(listed.shape[2], batch * sets)](
        q,
        k,
        v,
        listed,
        bits,
        counts,
        lengths,
        out,
        tokens,
        q_len,
        sets,
        listed.shape[3],
        scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        GROUP=heads // sets,
        GROUP_POW2=group_pow2,
        PER_KEY=sets // groups,
        TILE=tile,
        BLOCK=block_size,
        BLOCK_N=min(tiles.block_n, block_size),
        D=dim,
        BLOCK_D=max(16, pow2(dim)),
        num_warps=8 if tile * group_pow2 >= 128 else 4,
        num_stages=tiles.num_stages,
    )


def tile_blocks(blocks: Tensor, *, tile: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `tile` neighbouring tokens chose together, from blocks [B, S, Tq, K] of `count`:

    the blocks that any of them chose, int32 [B, S, tiles, count], ascending, anything after them;
    which tokens chose each, int64 of the same shape, the lowest bit for a tile's first token;
    how many there are, int32 [B, S, tiles].
    """
    batch, sets, q_len, _ = blocks.shape
    tiles = -(-q_len // tile)
    bit = torch.arange(q_len, device=blocks.device) % tile
    added = torch.ones_like(bit).bitwise_left_shift(bit)[:, None].expand(blocks.shape)
    # A tile's blocks and a place for no block; a token adds its bit to each of its blocks.
    chosen = torch.zeros(
        (batch, sets, tiles, count + 1), dtype=torch.int64, device=blocks.device
    ).flatten(2)
    first = (torch.arange(q_len, device=blocks.device) // tile * (count + 1))[:, None]
    place = torch.where(blocks < 0, count, blocks) + first
    chosen.scatter_add_(-1, place.flatten(2), added.flatten(2))
    chosen = chosen.view(batch, sets, tiles, count + 1)[..., :count]
    wanted = chosen != 0
    ranks = wanted.cumsum(-1)
    counts = ranks[..., -1].to(torch.int32)
    spare = torch.zeros_like(chosen[..., :1])
    at = torch.where(wanted, ranks - 1, count)
    block = torch.arange(count, device=blocks.device).expand(chosen.shape)
    listed = torch.cat([torch.zeros_like(chosen), spare], -1).scatter_(-1, at, block)[..., :count]
    bits = chosen.gather(-1, listed)
    return listed.to(torch.int32).contiguous(), bits, counts


def block_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    lengths: Tensor | None = None,
    tokens: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`block_attention` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs)."""
    _check(q, k, v, blocks)
    seen = block_mask(blocks, k.shape[2], block_size=block_size, lengths=lengths, tokens=tokens)
    seen = seen.repeat_interleave(q.shape[1] // blocks.shape[1], dim=1)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    used = seen.any(2)[..., None]  # tokens that no query sees may hold anything
    return softmax_attention_ref(q, k, torch.where(used, v, 0), seen, scale)


def block_mask(
    blocks: Tensor,
    capacity: int,
    *,
    block_size: int,
    lengths: Tensor | None = None,
    tokens: int | None = None,
    behind: int = 0,
) -> Tensor:
    """Which keys each query sees, bool [B, S, Tq, capacity]: chosen, and at or before it.

    behind: tokens after the last query, as in `top_blocks`.
    """
    count = -(-capacity // block_size)
    shape = (*blocks.shape[:3], count + 1)
    chosen = torch.zeros(shape, dtype=torch.bool, device=blocks.device)
    chosen.scatter_(-1, torch.where(blocks < 0, count, blocks).long(), True)
    by_token = chosen[..., :count].repeat_interleave(block_size, dim=-1)[..., :capacity]
    position = positions(
        blocks, tokens=capacity if tokens is None else tokens, lengths=lengths, behind=behind
    )[1]
    return by_token & (torch.arange(capacity, device=blocks.device) <= position)


def _check(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> None:
    (batch, heads, q_len, dim), groups = q.shape, k.shape[1]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (batch, dim) or heads % groups:
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}, v {tuple(v.shape)}")
    sets = blocks.shape[1]
    if blocks.shape[0] != batch or sets not in (groups, heads) or blocks.shape[2] != q_len:
        raise ValueError(
            f"blocks {tuple(blocks.shape)} do not fit q {tuple(q.shape)} with {groups} KV heads"
        )
    if dim > 256:
        raise ValueError(f"head dimension {dim} is over 256")
