"""Attention in which each KV head is either full or streaming (sink + recent tokens).

The function: DuoAttention (arXiv 2410.10819), streaming heads after StreamingLLM (arXiv
2309.17453) with absolute positions. A key j is visible to a query i if j <= i and, in a streaming
head, j < sink or i - j < window (so `window` counts the query's own token). `head_prefill` masks
by token and skips the key blocks that no query of a tile sees; `head_decode` reads a split cache:
whole rows for full heads, or chosen blocks of them (LServe, arXiv 2502.14866), sink + recent tokens
for streaming ones.

Layouts: q [B, H, Tq, D], k and v [B, G, Tk, D] with H a multiple of G; query head h reads KV head
h // (H // G). fp16 or bf16 on a device; any strides with a dense last dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.triton.launch import LOG2_E, copyable, dense, pow2, ranges, score_scale


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Tile shape of the prefill kernel; `overlap` runs values one key block behind scores."""

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3
    overlap: bool = True


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """Tile shape of the decode kernel; `programs_per_sm` sets the number of splits."""

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 4


def head_order(streaming: Tensor) -> Tensor:
    """KV head of each row of a split cache: full heads first, each class by number.

    streaming: bool [G]. Returns int32 [G]. The first `G - streaming.sum()` entries are the rows of
    the full cache, the others the rows of the streaming cache.
    """
    return torch.argsort(streaming.to(torch.uint8), stable=True).to(torch.int32)


def head_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    streaming: Tensor,
    sink: int,
    window: int,
    scale: float | None = None,
    tiles: PrefillTiles | None = None,
) -> Tensor:
    """Causal attention, each KV head full or streaming. Returns [B, H, Tq, D] in q's dtype.

    streaming: bool [G]. Tq may be shorter than Tk (a later chunk of a prompt): the last query then
    sits at the last key. `scale` is 1/sqrt(D) if not given. Raises ValueError on shapes that don't
    fit, D > 128, or negative sink or window < 1.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from compressor_kernels.attention import head_attention_jit as jit

    _check(q, k, v)
    _check_window(streaming, sink, window, heads=k.shape[1])
    batch, heads, q_len, dim = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    if q_len > k_len:
        raise ValueError(f"{q_len} queries cannot end at key {k_len}: causal needs Tq <= Tk")
    tiles = tiles or PrefillTiles()
    block_d = pow2(dim)
    q, k, v = copyable(q), copyable(k), copyable(v)
    out = torch.empty((batch, heads, q_len, dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out

    def described(x: Tensor, rows: int) -> object:
        return TensorDescriptor.from_tensor(x, [1, 1, rows, block_d])

    grid = (-(-q_len // tiles.block_m) * batch * heads,)
    jit.prefill_kernel[grid](
        described(q, tiles.block_m),
        described(k, tiles.block_n),
        described(v, tiles.block_n),
        described(out, tiles.block_m),
        streaming.to(q.device),
        q_len,
        k_len,
        batch,
        sink,
        window,
        score_scale(scale, dim) * LOG2_E,
        HEADS=groups,
        HEADS_POW2=pow2(groups),
        GROUP=heads // groups,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=block_d,
        OVERLAP=tiles.overlap,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def head_prefill_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    streaming: Tensor,
    sink: int,
    window: int,
    scale: float | None = None,
) -> Tensor:
    """`head_prefill` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs)."""
    _check(q, k, v)
    _check_window(streaming, sink, window, heads=k.shape[1])
    heads, q_len, k_len = q.shape[1], q.shape[2], k.shape[2]
    row = torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
    key = torch.arange(k_len, device=q.device)[None, :]
    recent = (key < sink) | (row - key < window)
    per_head = streaming.to(q.device).repeat_interleave(heads // k.shape[1])[:, None, None]
    visible = (key <= row) & (recent | ~per_head)
    return softmax_attention_ref(q, k, v, visible, scale)


def head_decode(
    q: Tensor,
    full_k: Tensor,
    full_v: Tensor,
    stream_k: Tensor,
    stream_v: Tensor,
    *,
    order: Tensor,
    full_len: Tensor | None = None,
    stream_len: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
    tiles: DecodeTiles | None = None,
) -> Tensor:
    """One decoding step over a split cache. Returns [B, H, 1, D] in q's dtype.

    q [B, H, 1, D]; full_k, full_v [B, G_full, T, D]; stream_k, stream_v [B, G_stream, C, D], the
    kept sink and recent tokens in any order. `order` int32 [G]: the KV head of each cache row, full
    rows first (`head_order`). full_len, stream_len int32 [B]: tokens in use, all if not given.
    blocks int32 [B, G_full, K] ascending and then -1: the blocks of block_size keys that full rows
    are read in, one choice for all query heads of a KV head. Keys are split among programs and
    merged in a fixed order: the same inputs give the same bits.
    """
    groups = full_k.shape[1] + stream_k.shape[1]
    if order.shape != (groups,):
        raise ValueError(f"order has shape {tuple(order.shape)}, the caches hold {groups} KV heads")
    caches = (full_k, full_v, stream_k, stream_v)
    tiles = tiles or DecodeTiles()
    if blocks is not None and (blocks.shape[:2] != full_k.shape[:2] or block_size % tiles.block_n):
        raise ValueError(
            f"blocks {tuple(blocks.shape)} of {block_size} keys do not fit {full_k.shape[1]} full "
            f"heads in tiles of {tiles.block_n}"
        )
    lengths = (full_len, stream_len)
    return _decode(q, caches, order, lengths, scale, tiles, blocks=blocks, block_size=block_size)


def full_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    tiles: DecodeTiles | None = None,
) -> Tensor:
    """One decoding step with every KV head full: q [B, H, 1, D], k and v [B, G, T, D]."""
    none = k[:, :0]
    return _decode(q, (k, v, none, none), None, (lengths, None), scale, tiles or DecodeTiles())


def head_decode_ref(
    q: Tensor,
    full_k: Tensor,
    full_v: Tensor,
    stream_k: Tensor,
    stream_v: Tensor,
    *,
    order: Tensor,
    full_len: Tensor | None = None,
    stream_len: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """`head_decode` in plain PyTorch, one KV head at a time."""
    group = q.shape[1] // order.shape[0]
    out = torch.empty_like(q)
    read = listed_keys(blocks, full_k.shape[2], block_size=block_size)
    for row, g in enumerate(order.tolist()):
        full = row < full_k.shape[1]
        at = row if full else row - full_k.shape[1]
        k, v = (full_k, full_v) if full else (stream_k, stream_v)
        members = slice(g * group, (g + 1) * group)
        out[:, members] = full_decode_ref(
            q[:, members],
            k[:, at : at + 1],
            v[:, at : at + 1],
            lengths=full_len if full else stream_len,
            read=None if read is None or not full else read[:, at : at + 1],
            scale=scale,
        )
    return out


def listed_keys(blocks: Tensor | None, tokens: int, *, block_size: int) -> Tensor | None:
    """Which keys listed blocks [B, G, K] hold, bool [B, G, T]."""
    if blocks is None:
        return None
    key = torch.arange(tokens, device=blocks.device) // block_size
    return (blocks[..., None] == key).any(2)


def full_decode_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    read: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`full_decode` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs); read: keys that are
    read at all, bool [B, G, T]."""
    visible = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
    if read is not None:
        visible = read.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[:, :, None]
    if lengths is not None:
        token = torch.arange(k.shape[2], device=q.device)
        used = (token[None, :] < lengths[:, None].to(q.device))[:, None, None, :]
        v = torch.where(used.transpose(-1, -2), v, 0)  # unused slots may hold anything
        visible = visible & used
    return softmax_attention_ref(q, k, v, visible, scale)


def _decode(
    q: Tensor,
    caches: tuple[Tensor, Tensor, Tensor, Tensor],
    order: Tensor | None,
    lengths: tuple[Tensor | None, Tensor | None],
    scale: float | None,
    tiles: DecodeTiles,
    *,
    blocks: Tensor | None = None,
    block_size: int = 64,
) -> Tensor:
    from compressor_kernels.attention import head_attention_jit as jit

    for k, v in (caches[:2], caches[2:]):
        _check(q, k, v, groups=caches[0].shape[1] + caches[2].shape[1])
    if q.shape[2] != 1:
        raise ValueError(f"decoding takes one query a row, not {q.shape[2]}")
    q, full_k, full_v, stream_k, stream_v = (dense(x) for x in (q, *caches))
    batch, heads, _, dim = q.shape
    full_rows, stream_rows = full_k.shape[1], stream_k.shape[1]
    group = heads // (full_rows + stream_rows)
    chosen = 1 if blocks is None else blocks.shape[2]
    read = full_k.shape[2] if blocks is None else min(full_k.shape[2], chosen * block_size)
    lanes, most = batch * full_rows, read // (4 * tiles.block_n)
    splits = ranges(full_k, lanes=lanes, most=most, programs_per_sm=tiles.programs_per_sm)
    out = torch.empty((batch, heads, 1, dim), dtype=q.dtype, device=q.device)
    part = torch.empty((batch, heads, splits, dim + 1), dtype=torch.float32, device=q.device)
    part, lse = part.view(-1)[: -batch * heads * splits], part.view(-1)[-batch * heads * splits :]
    block_d = pow2(dim)
    jit.decode_kernel[(batch * (full_rows * splits + stream_rows),)](
        q,
        full_k,
        full_v,
        stream_k,
        stream_v,
        *lengths,
        order,
        None if blocks is None else blocks.contiguous(),
        out,
        part,
        lse,
        full_rows,
        stream_rows,
        full_k.shape[2],
        stream_k.shape[2],
        score_scale(scale, dim) * LOG2_E,
        *q.stride()[:2],
        *full_k.stride()[:3],
        *full_v.stride()[:3],
        *stream_k.stride()[:3],
        *stream_v.stride()[:3],
        batch,
        D=dim,
        GROUP=group,
        SPLITS=splits,
        K=chosen,
        K_POW2=pow2(chosen),
        BLOCK=block_size,
        BLOCK_G=max(16, pow2(group)),
        BLOCK_N=tiles.block_n,
        BLOCK_D=block_d,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        jit.combine_kernel[(batch * full_rows * group,)](
            part,
            lse,
            order,
            out,
            full_rows,
            heads,
            D=dim,
            GROUP=group,
            SPLITS=splits,
            BLOCK_S=pow2(splits),
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out


def softmax_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None
) -> Tensor:
    """Attention under a mask, computed in fp32 (fp64 for fp64 inputs)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * score_scale(scale, q.shape[-1])
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, *, groups: int | None = None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q, k, v must be [B, H, Tq, D], [B, G, Tk, D] twice, not {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    groups = k.shape[1] if groups is None else groups
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % groups:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)} with {groups} KV heads"
        )
    if q.shape[3] > 128 or q.shape[3] % 8:
        raise ValueError(f"head dimension {q.shape[3]} is not a multiple of 8 up to 128")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")


def _check_window(streaming: Tensor, sink: int, window: int, *, heads: int) -> None:
    if streaming.shape != (heads,) or streaming.dtype != torch.bool:
        raise ValueError(f"streaming must be bool [{heads}], one for each KV head")
    if sink < 0 or window < 1:
        raise ValueError(f"sink {sink} must be >= 0 and window {window} >= 1")
