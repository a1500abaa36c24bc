"""Attention that skips tiles whose softmax weights are negligible: BLASST (arXiv 2512.12087), which
TensorRT-LLM calls skip softmax.

While a tile of queries goes through the keys, each query's largest score so far is known. A tile of
keys is skipped if the largest score of every query in it lies more than ln(threshold) below that:
no exponentials, no values read, no second product. Softmax is over the tiles that are left. As
thresholds are below 1, a skipped tile never holds a query's largest score, so what is skipped
follows from scores alone (`tile_gaps_ref`): a tile at a gap g is skipped where g < ln(threshold).

A tile is `rows` queries of one head, counted from the call's first, times `keys` keys; packed, it
is the query heads of one KV head at one token, as decoding reads them together. What is skipped
depends on both sizes. Rows past the last query don't count; the first tile is never skipped.

Layouts: q [B, H, Tq, D], the last Tq of the text, k and v [B, G, T, D].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.attention.head_attention import softmax_attention_ref
from compressor_kernels.triton.launch import LOG2_E, dense, pow2, ranges, score_scale


@dataclass(frozen=True, slots=True)
class SkipTiles:
    """Tile shape of the kernels; `programs_per_sm` sets the number of splits of a decoding step,
    each of which begins with no largest score."""

    rows: int = 128
    keys: int = 128
    num_warps: int = 8
    num_stages: int = 3
    programs_per_sm: int = 4


@dataclass(frozen=True, slots=True)
class Skipped:
    """Attention [B, H, Tq, D]; what was done with each tile, int8 [B, H (G if packed), query tiles,
    key tiles]: 1 skipped, 0 computed, -1 not visited; and how many ranges keys were split into."""

    out: Tensor
    tiles: Tensor
    splits: int = 1


def skip_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: float | Tensor,
    scale: float | None = None,
    tiles: SkipTiles | None = None,
) -> Skipped:
    """Causal attention of a prompt, or a later chunk of one, by query head.

    threshold: below 1, for all rows of the batch or [B] for each; scale is 1/sqrt(D) if not given.
    """
    from compressor_kernels.attention import skip_softmax_jit as jit

    q, k, v = _checked(q, k, v)
    tiles = tiles or SkipTiles()
    (batch, heads, q_len, dim), (groups, k_len) = q.shape, k.shape[1:3]
    out = torch.empty((batch, heads, q_len, dim), dtype=q.dtype, device=q.device)
    done = torch.full(
        (batch, heads, -(-q_len // tiles.rows), -(-k_len // tiles.keys)),
        -1,
        dtype=torch.int8,
        device=q.device,
    )
    jit.skip_prefill_kernel[(batch * heads, done.shape[2])](
        q,
        k,
        v,
        _log2(threshold, batch, q.device),
        out,
        done,
        q_len,
        k_len,
        done.shape[3],
        heads,
        score_scale(scale, dim) * LOG2_E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        GROUP=heads // groups,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        D=dim,
        BLOCK_D=max(16, pow2(dim)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return Skipped(out, done)


def skip_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: float | Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    tiles: SkipTiles | None = None,
) -> Skipped:
    """One decoding step, packed. lengths int32 [B]: keys in use, all if not given."""
    from compressor_kernels.attention import skip_softmax_jit as jit
    from compressor_kernels.attention.head_attention_jit import combine_kernel

    q, k, v = _checked(q, k, v)
    if q.shape[2] != 1:
        raise ValueError(f"decoding takes one query a row, not {q.shape[2]}")
    tiles = tiles or SkipTiles(num_warps=4)
    (batch, heads, _, dim), (groups, k_len) = q.shape, k.shape[1:3]
    group, count = heads // groups, -(-k_len // tiles.keys)
    most = k_len // (4 * tiles.keys)
    splits = ranges(k, lanes=batch * groups, most=most, programs_per_sm=tiles.programs_per_sm)
    out = torch.empty((batch, heads, 1, dim), dtype=q.dtype, device=q.device)
    done = torch.full((batch, groups, 1, count), -1, dtype=torch.int8, device=q.device)
    part = torch.empty((batch, heads, splits, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    jit.skip_decode_kernel[(batch * groups, splits)](
        q,
        k,
        v,
        _log2(threshold, batch, q.device),
        lengths,
        part,
        lse,
        done,
        k_len,
        count,
        groups,
        score_scale(scale, dim) * LOG2_E,
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        GROUP=group,
        BLOCK_G=max(16, pow2(group)),
        KEYS=tiles.keys,
        D=dim,
        BLOCK_D=max(16, pow2(dim)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    combine_kernel[(batch * heads,)](
        part,
        lse,
        None,
        out,
        groups,
        heads,
        D=dim,
        GROUP=group,
        SPLITS=splits,
        BLOCK_S=pow2(splits),
        BLOCK_D=pow2(dim),
        num_warps=4,
    )
    return Skipped(out, done, splits)


def tile_gaps_ref(
    q: Tensor,
    k: Tensor,
    *,
    rows: int,
    keys: int,
    packed: bool = False,
    splits: int = 1,
    scale: float | None = None,
) -> Tensor:
    """How far the largest scores of each tile lie below those before it, at the query where that is
    least: [B, H, query tiles, key tiles], [B, G, Tq, key tiles] if packed. inf: always computed;
    -inf: no query sees any of it.

    splits: ranges of keys, each of which begins anew.
    """
    size = 1 if packed else rows
    step = max(size, 128 // size * size)  # whole tiles, and not all scores at a time
    behind = q.shape[2]
    parts = []
    for part in q.split(step, dim=2):
        behind -= part.shape[2]
        seen = k[:, :, : k.shape[2] - behind]
        gap = _gaps(
            part, seen, keys, -(-k.shape[2] // keys), splits, score_scale(scale, q.shape[3])
        )
        if packed:
            parts.append(gap.unflatten(1, (k.shape[1], -1)).amax(2))
            continue
        fill = -part.shape[2] % rows
        gap = torch.nn.functional.pad(gap, (0, 0, 0, fill), value=-torch.inf)
        parts.append(gap.unflatten(2, (-1, rows)).amax(3))
    return torch.cat(parts, dim=2)


def _gaps(q: Tensor, k: Tensor, keys: int, count: int, splits: int, scale: float) -> Tensor:
    """The gaps of each query, [B, H, Tq, count]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_len, (groups, k_len) = q.shape[2], k.shape[1:3]
    scores = q.to(wide).unflatten(1, (groups, -1)) @ k.to(wide)[:, :, None].transpose(-1, -2)
    scores = scores.flatten(1, 2) * scale
    key = torch.arange(k_len, device=q.device)
    scores = scores.masked_fill(key > key[k_len - q_len :, None], -torch.inf)
    scores = torch.nn.functional.pad(scores, (0, count * keys - k_len), value=-torch.inf)
    top = scores.unflatten(-1, (count, keys)).amax(-1)
    chunk = -(-count // splits)
    before = torch.full_like(top, -torch.inf)
    for start in range(0, count, chunk):
        running = top[..., start : start + chunk].cummax(-1).values
        before[..., start + 1 : start + chunk] = running[..., :-1]
    # A query needs nothing of a tile that it does not see, and all of the first that it sees.
    return torch.where(top == -torch.inf, -torch.inf, top - before)


def visited_tiles(q_len: int, k_len: int, *, rows: int, keys: int) -> Tensor:
    """Which tiles a causal kernel goes through, bool [query tiles, key tiles]."""
    last = torch.arange(1, -(-q_len // rows) + 1) * rows + k_len - q_len
    return torch.arange(-(-k_len // keys)) * keys < last.clamp(max=k_len)[:, None]


def skip_softmax_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: float,
    rows: int,
    keys: int,
    packed: bool = False,
    splits: int = 1,
    scale: float | None = None,
) -> Skipped:
    """`skip_prefill` and, packed, `skip_decode` in plain PyTorch, by the definition."""
    gaps = tile_gaps_ref(q, k, rows=rows, keys=keys, packed=packed, splits=splits, scale=scale)
    skipped = gaps < math.log(threshold)
    heads, q_len, k_len = q.shape[1], q.shape[2], k.shape[2]
    size = 1 if packed else rows
    seen = kept_mask(skipped, q_len, k_len, rows=size, keys=keys)
    seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
    out = softmax_attention_ref(q, k, v, seen, scale)
    visited = visited_tiles(q_len, k_len, rows=size, keys=keys).to(q.device)
    return Skipped(out, torch.where(visited, skipped.to(torch.int8), -1), splits)


def kept_mask(
    skipped: Tensor,
    q_len: int,
    k_len: int,
    *,
    rows: int,
    keys: int,
    part: slice = slice(None),
) -> Tensor:
    """Which keys each query (or those of a range of them) sees, bool [B, H or G, n, T]."""
    key = torch.arange(k_len, device=skipped.device)
    query = torch.arange(q_len, device=skipped.device)[part]
    kept = ~skipped[:, :, query // rows][..., key // keys]
    return kept & (key <= query[:, None] + k_len - q_len)


def _log2(threshold: float | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(threshold, Tensor):
        return threshold.to(device, torch.float32).expand(batch).log2().contiguous()
    if not 0 < threshold < 1:
        raise ValueError(f"a threshold lies between 0 and 1, not at {threshold}")
    return torch.full((batch,), math.log2(threshold), dtype=torch.float32, device=device)


def _checked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}")
    return dense(q), dense(k), dense(v)
