"""Prefill over chosen tiles: each block of queries attends to listed blocks of keys.

What XAttention does once blocks are chosen. Blocks of queries and keys lie on one grid from the
text's beginning; attention is exact and causal inside what was chosen, one choice for each query
head. A query's own block has to be among its chosen ones.

Layouts: q [B, H, Tq, D], the last Tq of the text, k and v [B, G, T, D], chosen bool [B, H, query
blocks, key blocks].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.attention.head_attention import softmax_attention_ref
from compressor_kernels.triton.launch import LOG2_E, copyable, dense, pow2, score_scale


@dataclass(frozen=True, slots=True)
class TileShape:
    """Keys of a tile that are read together, and how many of these are on their way."""

    block_n: int = 128
    num_stages: int = 3


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    tiles: TileShape | None = None,
) -> Tensor:
    """Attention over chosen tiles, [B, H, Tq, D] in q's dtype. block_size: a power of two from 16
    to 128; scale is 1/sqrt(D) if not given."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from compressor_kernels.attention import tile_attention_jit as jit

    _check(q, k, v, chosen, block_size)
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"blocks of {block_size} are no power of two from 16 to 128")
    q, k, v = dense(q), copyable(k), copyable(v)
    (batch, heads, q_len, dim), (groups, k_len) = q.shape, k.shape[1:3]
    first = (k_len - q_len) // block_size
    out = torch.empty((batch, heads, q_len, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    listed = torch.empty(chosen.shape, dtype=torch.int32, device=q.device)
    counts = torch.empty(chosen.shape[:3], dtype=torch.int32, device=q.device)
    rows, blocks = chosen.shape[2:]
    jit.list_kernel[(rows, batch * heads)](
        chosen.contiguous().view(torch.uint8),
        listed,
        counts,
        first,
        blocks,
        BLOCKS_POW2=pow2(blocks),
        num_warps=1 if blocks <= 1024 else 4,
    )
    tiles = tiles or TileShape(128 if dim <= 128 else 64)
    block_n, block_d = min(tiles.block_n, block_size), max(16, pow2(dim))
    jit.tile_prefill_kernel[(batch * heads, rows)](
        q,
        *(TensorDescriptor.from_tensor(x, [1, 1, block_n, block_d]) for x in (k, v)),
        listed,
        counts,
        out,
        q_len,
        k_len,
        first,
        blocks,
        heads,
        score_scale(scale, dim) * LOG2_E,
        *q.stride()[:3],
        GROUP=heads // groups,
        BLOCK=block_size,
        BLOCK_N=block_n,
        D=dim,
        BLOCK_D=block_d,
        num_warps=8 if block_size == 128 else 4,
        num_stages=tiles.num_stages,
    )
    return out


def tile_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, *, block_size: int, scale: float | None = None
) -> Tensor:
    """`tile_attention` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs)."""
    _check(q, k, v, chosen, block_size)
    seen = tile_mask(chosen, q.shape[2], k.shape[2], block_size=block_size)
    return softmax_attention_ref(q, k, v, seen, scale)


def tile_mask(
    chosen: Tensor, q_len: int, k_len: int, *, block_size: int, part: slice = slice(None)
) -> Tensor:
    """Which keys each query (or those of a range of them) sees, bool [B, H, n, T]: in a chosen
    tile, and at or before it."""
    key = torch.arange(k_len, device=chosen.device)
    query = key[k_len - q_len :][part]
    first = (k_len - q_len) // block_size
    by_query = chosen[:, :, query // block_size - first]
    seen: Tensor = by_query[..., key // block_size] & (key <= query[:, None])
    return seen


def density(chosen: Tensor, *, first: int = 0, kv_heads: int | None = None) -> Tensor:
    """Chosen share of the causal tiles, fp64 by query head [H]; with kv_heads, a tile counts for a
    KV head [G] if any of its query heads chose it."""
    row = torch.arange(first, first + chosen.shape[2], device=chosen.device)[:, None]
    causal = torch.arange(chosen.shape[3], device=chosen.device) <= row
    if kv_heads is not None:
        chosen = chosen.unflatten(1, (kv_heads, -1)).any(2)
    return (chosen & causal).double().sum((2, 3)).mean(0) / causal.sum()


def _check(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_size: int) -> None:
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}")
    first = (k.shape[2] - q.shape[2]) // block_size
    blocks = -(-k.shape[2] // block_size)
    if tuple(chosen.shape) != (*q.shape[:2], blocks - first, blocks):
        raise ValueError(
            f"chosen {tuple(chosen.shape)} is not {blocks - first} x {blocks} blocks for each of "
            f"{q.shape[1]} heads"
        )
