"""Triton code of `verify_attention`: a few queries over ranges of keys, and shares of each key."""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN


@triton.jit
def verify_kernel(
    q_ptr,  # [B, G, rows, D]: the queries of the heads of a KV head, dense
    k_ptr,  # [B, G, T, D]
    v_ptr,
    score_ptr,  # [B, G, rows, T] fp16
    part_ptr,  # [B, G, rows, splits, D] fp32
    lse_ptr,  # [B, G, rows, splits]
    k_len,
    q_len,
    rows,
    groups,
    scale,  # holds log2(e)
    k_b,
    k_g,
    k_t,
    v_b,
    v_g,
    v_t,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    b = lane // groups
    g = lane % groups
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    inner = tl.arange(0, BLOCK_N)
    real = row < rows
    position = k_len - q_len + row % q_len
    mask = real[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + (lane * rows + row)[:, None] * D + dim[None, :], mask=mask, other=0.0)
    k_base = k_ptr + b * k_b + g * k_g + dim[:, None]
    v_base = v_ptr + b * v_b + g * v_g + dim[None, :]
    left = score_ptr + (lane * rows + row)[:, None] * k_len
    chunk = tl.cdiv(tl.cdiv(k_len, splits), BLOCK_N) * BLOCK_N
    m = tl.full([ROWS], HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for base in tl.range(split * chunk, tl.minimum(k_len, split * chunk + chunk), BLOCK_N):
        key = base + inner
        live = key < k_len
        at = key.to(tl.int64)
        k = tl.load(k_base + at[None, :] * k_t, mask=live[None, :] & (dim < D)[:, None], other=0.0)
        seen = live[None, :] & (key[None, :] <= position[:, None])
        scores = tl.where(seen, tl.dot(q, k) * scale, HIDDEN)
        kept = tl.maximum(scores, -60000.0).to(tl.float16)
        tl.store(left + at[None, :], kept, mask=real[:, None] & live[None, :])
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.where(seen, tl.math.exp2(scores - m_new[:, None]), 0.0)
        fade = tl.math.exp2(m - m_new)
        l = l * fade + tl.sum(p, 1)
        v = tl.load(v_base + at[:, None] * v_t, mask=live[:, None] & (dim < D)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        m = m_new
    some = tl.maximum(l, 1.0e-30)  # an empty range has l = 0 and weighs nothing in the merge
    at_part = (lane * rows + row) * splits + split
    tl.store(part_ptr + at_part[:, None] * D + dim[None, :], acc / some[:, None], mask=mask)
    tl.store(lse_ptr + at_part, m + tl.math.log2(some), mask=real)


@triton.jit
def share_kernel(
    score_ptr,  # [B, G, rows, T] fp16
    sum_ptr,  # [B, G, rows] fp32
    out_ptr,  # [B, G, T] fp32
    k_len,
    rows,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (key < k_len)[None, :]
    at = score_ptr + (lane * rows + row)[:, None] * k_len + key[None, :]
    scores = tl.load(at, mask=inside, other=-60000.0).to(tl.float32)
    total = tl.load(sum_ptr + lane * rows + row, mask=row < rows, other=0.0)
    shares = tl.where(inside, tl.math.exp2(scores - total[:, None]), 0.0)
    tl.store(out_ptr + lane * k_len + key, tl.sum(shares, 0) / rows, mask=key < k_len)
