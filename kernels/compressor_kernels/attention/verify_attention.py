"""What self-speculative decoding verifies with: a few tokens over a whole cache, and how much each
key was attended to, which SparseSpec's PillarAttn (arXiv 2512.01278) chooses the next drafts' keys
by. Attention leaves its scores behind, so that keys are not read a second time.

Layouts: q [B, H, Tq, D], the last Tq of the text, k and v [B, G, T, D]. Shares [B, G, T] are means
over the queries and the query heads of a KV head of what each key got in the softmax. Draft steps
over the chosen keys are `block_attention` with blocks of one key.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.triton.launch import LOG2_E, dense, pow2, ranges, score_scale

PART, SHARED = 4096, 1024
"""Keys whose shares one program goes through, and of which it makes shares."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Attention [B, H, Tq, D], what is left of its scores fp16 [B, G, H / G * Tq, T] (base 2,
    before the softmax), and logarithms in base 2 of the softmax's sums, fp32 [B, H, Tq]."""

    out: Tensor
    scores: Tensor
    sums: Tensor


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
    scores = torch.empty((batch, groups, rows, tokens), dtype=torch.float16, device=q.device)
    part = torch.empty((batch * heads * q_len, splits, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty(part.shape[:2], dtype=torch.float32, device=q.device)
    jit.verify_kernel[(batch * groups, splits)](
        q,
        k,
        v,
        scores,
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
    return Verified(out, scores, sums.view(batch, heads, q_len))


def key_shares(done: Verified) -> Tensor:
    """Shares of every key, fp32 [B, G, T]."""
    from compressor_kernels.attention import verify_attention_jit as jit

    batch, groups, rows, tokens = done.scores.shape
    out = torch.empty((batch, groups, tokens), dtype=torch.float32, device=done.out.device)
    jit.share_kernel[(-(-tokens // SHARED), batch * groups)](
        done.scores, done.sums.contiguous(), out, tokens, ROWS=rows, BLOCK_N=SHARED, num_warps=4
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
    """`critical_keys_ref` of shares of 0 and more in fp32, without a sort; of equal shares the
    lower key wins."""
    from compressor_kernels.attention import verify_attention_jit as jit

    shares = shares.contiguous()
    batch, groups, capacity = shares.shape
    old = max(0, length - recent)
    best = min(old, max(0, min(budget, length) - recent))
    total = best + length - old
    out = torch.empty((batch, groups, total), dtype=torch.int32, device=shares.device)
    if out.numel() == 0:
        return out
    lanes, parts = batch * groups, max(1, -(-old // PART))
    tallies = torch.zeros((3, lanes, jit.BINS.value), dtype=torch.int32, device=shares.device)
    found = torch.empty((2, lanes, parts), dtype=torch.int32, device=shares.device)
    bounds = (old, capacity, best)
    for digit in range(3):
        jit.digit_kernel[(parts, lanes)](
            shares, tallies, lanes, *bounds, DIGIT=digit, PART=PART, num_warps=8
        )
    jit.found_kernel[(parts, lanes)](shares, tallies, found, lanes, *bounds, PART=PART, num_warps=8)
    jit.take_kernel[(parts, lanes)](
        shares,
        tallies,
        found,
        out,
        lanes,
        *bounds,
        length,
        PART=PART,
        PARTS_POW2=pow2(parts),
        RECENT_POW2=pow2(length - old),
        num_warps=8,
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
