"""What self-speculative decoding verifies with: a few tokens over a whole cache, and how much each
key was attended to, which SparseSpec's PillarAttn (arXiv 2512.01278) chooses the next drafts' keys
by. Attention leaves its weights behind, so that keys are not read a second time.

Layouts: q [B, H, Tq, D], the last Tq of the text, k and v [B, G, T, D]. Shares [B, G, T] are means
over the queries and the query heads of a KV head of what each key got in the softmax. Draft steps
over the chosen keys are `block_attention` with blocks of one key.

What is handed from one kernel to the next is as small as a choice of keys allows, because nearly
all of the time goes into moving it: weights are E4M3 where the device has it, and a mean over some
tens of them is off by half a percent; shares are bfloat16.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor_kernels.attention.head_attention import DecodeTiles
from compressor_kernels.triton.launch import (
    LOG2_E,
    dense,
    launch_early,
    overlaps,
    pow2,
    ranges,
    score_scale,
)

VERIFY = DecodeTiles(block_n=32, programs_per_sm=6)


@dataclass(frozen=True, slots=True)
class ShareTiles:
    """Tiles of keys of which a program makes shares."""

    tiles: int = 32
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class ChoiceTiles:
    """Keys whose shares a program goes through when the best are chosen; more in long texts."""

    part: int = 4096
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class Verified:
    """Attention [B, H, Tq, D]; what is left of its weights, `kept` [B, G, H / G * Tq, T] and fp32
    `tops` [B, G, T / tile, H / G * Tq]: of a key in a tile kept * 2 ** top; and logarithms in
    base 2 of their sums, fp32 [B, H, Tq]."""

    out: Tensor
    kept: Tensor
    tops: Tensor
    sums: Tensor
    tile: int


def verify_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kept: torch.dtype | None = None,
    tiles: DecodeTiles = VERIFY,
) -> Verified:
    """Causal attention of a few queries; H / G * Tq is 128 at most. scale: 1/sqrt(D) if None; kept:
    what weights are left in, E4M3 (if None, where the device has it) or fp16."""
    from compressor_kernels.attention import verify_attention_jit as jit
    from compressor_kernels.attention.quantized_cache_jit import merge_kernel

    q, k, v = q.contiguous(), dense(k), dense(v)
    (batch, heads, q_len, dim), (groups, tokens) = q.shape, k.shape[1:3]
    rows = heads // groups * q_len
    if rows > 128 or q_len > tokens or k.shape != v.shape or heads % groups:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}, or has over 128 rows"
        )
    block_n = tiles.block_n
    splits = ranges(
        k,
        lanes=batch * groups,
        most=tokens // (4 * block_n),
        programs_per_sm=tiles.programs_per_sm,
    )
    out = torch.empty_like(q)
    weights = torch.empty(
        (batch, groups, rows, tokens), dtype=kept or _weight_dtype(q.device), device=q.device
    )
    tops = torch.empty((batch, groups, -(-tokens // block_n), rows), device=q.device)
    part = torch.empty((batch * heads * q_len, splits, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty(part.shape[:2], dtype=torch.float32, device=q.device)
    jit.verify_kernel[(batch * groups, splits)](
        q,
        k,
        v,
        weights,
        tops,
        part,
        lse,
        tokens,
        q_len,
        rows,
        groups,
        score_scale(scale, dim) * LOG2_E,
        *k.stride()[:3],
        *v.stride()[:3],
        D=dim,
        ROWS=max(16, pow2(rows)),
        BLOCK_N=block_n,
        BLOCK_D=max(16, pow2(dim)),
        RAISED=15.0 if weights.dtype == torch.float16 else 8.0,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    merge_kernel[(batch * heads * q_len,)](
        part,
        lse,
        out,
        D=dim,
        SPLITS=splits,
        BLOCK_S=pow2(splits),
        BLOCK_D=pow2(dim),
        num_warps=4,
    )
    sums = torch.logsumexp(lse * math.log(2), -1) / math.log(2)
    return Verified(out, weights, tops, sums.view(batch, heads, q_len), block_n)


def _weight_dtype(device: torch.device) -> torch.dtype:
    """Triton converts to E4M3 from compute capability 8.9 on."""
    small = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return torch.float8_e4m3fn if small else torch.float16


def key_shares(done: Verified, *, tiles: ShareTiles | None = None) -> Tensor:
    """Shares of every key, bf16 [B, G, T]."""
    from compressor_kernels.attention import verify_attention_jit as jit

    batch, groups, rows, tokens = done.kept.shape
    tiles = tiles or ShareTiles()
    out = torch.empty((batch, groups, tokens), dtype=torch.bfloat16, device=done.out.device)
    jit.share_kernel[(-(-done.tops.shape[2] // tiles.tiles), batch * groups)](
        done.kept,
        done.tops,
        done.sums.contiguous(),
        out,
        tokens,
        ROWS=rows,
        TILE=done.tile,
        TILES=tiles.tiles,
        EARLY=overlaps(out),
        num_warps=tiles.num_warps,
    )
    return out


def key_shares_ref(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """Shares in plain PyTorch, fp32 (fp64 for fp64 inputs)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_len, (groups, tokens) = q.shape[2], k.shape[1:3]
    scores = q.to(wide).unflatten(1, (groups, -1)) @ k.to(wide)[:, :, None].transpose(-1, -2)
    key = torch.arange(tokens, device=q.device)
    hidden = key > key[tokens - q_len :, None]
    scores = (scores * score_scale(scale, q.shape[3])).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).mean((2, 3))


def verified_keys(
    done: Verified,
    *,
    length: int,
    recent: int,
    budget: int,
    shares: ShareTiles | None = None,
    choice: ChoiceTiles | None = None,
) -> Tensor:
    """`critical_keys` of `key_shares`, the one begun while the other ends."""
    return _take(
        key_shares(done, tiles=shares),
        length=length,
        recent=recent,
        budget=budget,
        tiles=choice,
        own_shares=True,
    )


def critical_keys(
    shares: Tensor, *, length: int, recent: int, budget: int, tiles: ChoiceTiles | None = None
) -> Tensor:
    """`critical_keys_ref` of shares from 0 to 1 in bf16 or fp16, without a sort; of equal shares
    the lower key wins."""
    return _take(shares, length=length, recent=recent, budget=budget, tiles=tiles, own_shares=False)


def _take(
    shares: Tensor,
    *,
    length: int,
    recent: int,
    budget: int,
    tiles: ChoiceTiles | None,
    own_shares: bool,
) -> Tensor:
    """`critical_keys`. own_shares: `share_kernel` was launched just before, and may still run."""
    from compressor_kernels.attention import verify_attention_jit as jit

    if shares.dtype.itemsize != 2:
        raise ValueError(f"shares are {shares.dtype}, not of 16 bits")
    tiles, shares = tiles or ChoiceTiles(), shares.contiguous()
    (batch, groups, row), device = shares.shape, shares.device
    lanes, (old, best) = batch * groups, _chosen_from(length, recent, budget)
    part = min(16384, max(tiles.part, pow2(old // 64)))
    parts = max(1, -(-old // part))
    total = best + length - old
    out = torch.empty((batch, groups, total), dtype=torch.int32, device=device)
    if out.numel() == 0:
        return out
    tallies = torch.empty((2, lanes, parts, jit.BINS.value), dtype=torch.int32, device=device)
    early = overlaps(shares)
    bounds = (lanes, old, row, best)
    how: dict[str, Any] = {"PART": part, "PARTS_POW2": pow2(parts), "num_warps": tiles.num_warps}
    for digit in range(2 if best else 0):
        # What the first of them waits for may be no kernel of ours.
        own = launch_early(early and (own_shares or digit > 0))
        jit.count_kernel[(parts, lanes)](
            shares.view(torch.int16), tallies, *bounds, PASS=digit, EARLY=early, **how, **own
        )
    jit.take_kernel[(parts, lanes)](
        shares.view(torch.int16),
        tallies,
        out,
        *bounds,
        length,
        RECENT_POW2=pow2(length - old),
        EARLY=early,
        **how,
        **launch_early(early and best > 0),
    )
    return out


def _chosen_from(length: int, recent: int, budget: int) -> tuple[int, int]:
    """Of the first how many keys how many are chosen by their shares."""
    old = max(0, length - recent)
    return old, min(old, max(0, min(budget, length) - recent))


def critical_keys_ref(shares: Tensor, *, length: int, recent: int, budget: int) -> Tensor:
    """The keys of a draft, int32 [B, G, n] ascending: of a text of `length` the last `recent`, and
    before these the best by shares, `budget` in all; at least the recent ones."""
    old, best = _chosen_from(length, recent, budget)
    ranked = shares[..., :old].sort(dim=-1, descending=True, stable=True).indices
    near = torch.arange(old, length, device=shares.device)
    chosen = ranked[..., :best].sort(-1).values
    return torch.cat([chosen, near.expand(*chosen.shape[:2], -1)], -1).to(torch.int32)
