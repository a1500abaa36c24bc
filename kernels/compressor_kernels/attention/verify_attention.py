"""What self-speculative decoding verifies with: a few tokens over a whole cache, and how much each
key was attended to, which SparseSpec's PillarAttn (arXiv 2512.01278) chooses the next drafts' keys
by. Attention leaves its weights behind, so that keys are not read a second time.

Layouts: q [B, H, Tq, D], the last Tq of the text, k and v [B, G, T, D]. Shares [B, G, T] are means
over the queries and the query heads of a KV head of what each key got in the softmax. Draft steps
over the chosen keys are `block_attention` with blocks of one key.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from compressor_kernels.triton.launch import (
    LOG2_E,
    dense,
    launch_early,
    overlaps,
    pow2,
    ranges,
    score_scale,
)

PART = 4096
"""Keys whose shares one program goes through."""


@dataclass(frozen=True, slots=True)
class ShareTiles:
    """Tiles of keys of which a program makes shares."""

    tiles: int = 8
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class Verified:
    """Attention [B, H, Tq, D]; what is left of its weights, fp16 `kept` [B, G, H / G * Tq, T] and
    fp32 `tops` [B, G, T / tile, H / G * Tq]: of a key in a tile kept * 2 ** top; and logarithms in
    base 2 of their sums, fp32 [B, H, Tq]."""

    out: Tensor
    kept: Tensor
    tops: Tensor
    sums: Tensor
    tile: int


def verify_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, block_n: int = 64
) -> Verified:
    """Causal attention of a few queries; H / G * Tq is 128 at most. scale: 1/sqrt(D) if None."""
    from compressor_kernels.attention import verify_attention_jit as jit
    from compressor_kernels.attention.quantized_cache_jit import merge_kernel

    q, k, v = q.contiguous(), dense(k), dense(v)
    (batch, heads, q_len, dim), (groups, tokens) = q.shape, k.shape[1:3]
    rows = heads // groups * q_len
    if rows > 128 or q_len > tokens or k.shape != v.shape or heads % groups:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}, or has over 128 rows"
        )
    splits = ranges(k, lanes=batch * groups, most=tokens // (4 * block_n), programs_per_sm=4)
    out = torch.empty_like(q)
    kept = torch.empty((batch, groups, rows, tokens), dtype=torch.float16, device=q.device)
    tops = torch.empty((batch, groups, -(-tokens // block_n), rows), device=q.device)
    part = torch.empty((batch * heads * q_len, splits, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty(part.shape[:2], dtype=torch.float32, device=q.device)
    jit.verify_kernel[(batch * groups, splits)](
        q,
        k,
        v,
        kept,
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
        num_warps=4,
        num_stages=3,
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
    return Verified(out, kept, tops, sums.view(batch, heads, q_len), block_n)


def key_shares(done: Verified, *, tiles: ShareTiles | None = None) -> Tensor:
    """Shares of every key, fp32 [B, G, T]."""
    from compressor_kernels.attention import verify_attention_jit as jit

    batch, groups, rows, tokens = done.kept.shape
    tiles = tiles or ShareTiles()
    out = torch.empty((batch, groups, tokens), dtype=torch.float32, device=done.out.device)
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


def critical_keys(shares: Tensor, *, length: int, recent: int, budget: int) -> Tensor:
    """`critical_keys_ref` of shares from 0 to 1 in fp32, without a sort; of equal shares the lower
    key wins."""
    shares = shares.contiguous()
    where = Choice.of(shares.shape[:2], length=length, recent=recent, budget=budget)
    return where.take(shares)


@dataclass(frozen=True, slots=True)
class Choice:
    """Critical keys of `lanes` KV heads [batch, groups]: of the first `old` keys the `best`, and
    all others up to `length`. Programs go through `part` keys, `parts` of them through all."""

    lanes: tuple[int, int]
    length: int
    old: int
    best: int
    part: int
    parts: int

    @classmethod
    def of(cls, lanes: Sequence[int], *, length: int, recent: int, budget: int) -> Self:
        old = max(0, length - recent)
        best = min(old, max(0, min(budget, length) - recent))
        part = min(16384, max(PART, pow2(old // 64)))
        return cls((lanes[0], lanes[1]), length, old, best, part, max(1, -(-old // part)))

    def take(self, shares: Tensor) -> Tensor:
        """The keys, int32 [batch, groups, n] ascending."""
        from compressor_kernels.attention import verify_attention_jit as jit

        lanes, device = math.prod(self.lanes), shares.device
        total = self.best + self.length - self.old
        out = torch.empty((*self.lanes, total), dtype=torch.int32, device=device)
        if out.numel() == 0:
            return out
        # Counts of digits, of three by lane and of the last by part, too.
        rows = (3 + self.parts) * lanes
        tallies = torch.zeros((rows, jit.BINS.value), dtype=torch.int32, device=device)
        cuts = torch.empty((3, lanes, 2), dtype=torch.int32, device=device)
        above = torch.empty((lanes, self.parts), dtype=torch.int32, device=device)
        found = (shares, tallies, cuts, above)
        bounds = (lanes, self.old, shares.shape[-1], self.best)
        early = overlaps(shares)
        how: dict[str, Any] = {"PART": self.part, "EARLY": early, "num_warps": 8}
        grid = (self.parts, lanes)
        for digit in range(4):
            # What the first of them waits for may be no kernel of ours.
            own = launch_early(early and digit > 0)
            jit.count_kernel[grid](*found, *bounds, PASS=digit, **how, **own)
        jit.take_kernel[grid](
            *found,
            out,
            *bounds,
            self.length,
            PARTS_POW2=pow2(self.parts),
            RECENT_POW2=pow2(self.length - self.old),
            **how,
            **launch_early(early),
        )
        return out


def critical_keys_ref(shares: Tensor, *, length: int, recent: int, budget: int) -> Tensor:
    """The keys of a draft, int32 [B, G, n] ascending: of a text of `length` the last `recent`, and
    before these the best by shares, `budget` in all; at least the recent ones."""
    old = max(0, length - recent)
    best = min(old, max(0, min(budget, length) - recent))
    ranked = shares[..., :old].sort(dim=-1, descending=True, stable=True).indices
    near = torch.arange(old, length, device=shares.device)
    chosen = ranked[..., :best].sort(-1).values
    return torch.cat([chosen, near.expand(*chosen.shape[:2], -1)], -1).to(torch.int32)
