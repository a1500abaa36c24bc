"""Triton code of `skip_softmax`: flash attention with a branch around exponentials and values."""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN
from compressor_kernels.triton.lengths_jit import text_length


@triton.jit
def _step(scores, real, m, l, acc, limit, v_at, v_mask):
    """One tile of keys: scores hold log2(e), and HIDDEN where a row does not see a key. Gives the
    state after it and whether it was skipped. Rows that are not `real` need nothing."""
    top = tl.max(scores, 1)
    # What has seen nothing yet (m at HIDDEN) is far above the limit as soon as it sees something.
    gap = tl.where(real & (top > HIDDEN * 0.5), top - m, HIDDEN)
    skip = tl.max(gap, 0) < limit
    if not skip:
        m_new = tl.maximum(m, top)
        fade = tl.math.exp2(m - m_new)
        p = tl.math.exp2(scores - m_new[:, None])
        l = l * fade + tl.sum(p, 1)
        v = tl.load(v_at, mask=v_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        m = m_new
    return m, l, acc, skip


@triton.jit
def skip_prefill_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,
    limit_ptr,  # [B] fp32, log2 of the threshold
    out_ptr,  # [B, H, Tq, D], dense
    done_ptr,  # [B, H, query tiles, key tiles] int8
    q_len,
    k_len,
    key_tiles,
    heads,
    scale,  # holds log2(e)
    q_b,
    q_h,
    q_t,
    k_b,
    k_g,
    k_t,
    v_b,
    v_g,
    v_t,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries of one head; later tiles, which see more, go first."""
    lane = tl.program_id(0).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b = lane // heads
    h = lane % heads
    limit = tl.load(limit_ptr + b)
    token = tile * ROWS + tl.arange(0, ROWS)
    position = token + k_len - q_len
    dim = tl.arange(0, BLOCK_D)
    inner = tl.arange(0, KEYS)
    real = token < q_len
    mask = real[:, None] & (dim < D)[None, :]
    q_at = q_ptr + b * q_b + h * q_h + token[:, None].to(tl.int64) * q_t + dim[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)
    k_base = k_ptr + b * k_b + h // GROUP * k_g + dim[:, None]
    v_base = v_ptr + b * v_b + h // GROUP * v_g + dim[None, :]
    done = done_ptr + (lane * tl.num_programs(1) + tile) * key_tiles
    first = tile * ROWS + k_len - q_len  # position of the tile's first query
    inside = (first + 1) // KEYS  # tiles before this one lie in every row's past
    total = tl.cdiv(tl.minimum(first + ROWS, k_len), KEYS)
    m = tl.full([ROWS], HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.range(0, inside):
        key = (step * KEYS + inner).to(tl.int64)
        k = tl.load(k_base + key[None, :] * k_t, mask=(dim < D)[:, None], other=0.0)
        scores = tl.dot(q, k) * scale
        v_at, v_mask = v_base + key[:, None] * v_t, (dim < D)[None, :] & (key >= 0)[:, None]
        m, l, acc, skip = _step(scores, real, m, l, acc, limit, v_at, v_mask)
        tl.store(done + step, skip.to(tl.int8))
    for step in tl.range(inside, total):
        key = (step * KEYS + inner).to(tl.int64)
        live = key < k_len
        k = tl.load(k_base + key[None, :] * k_t, mask=live[None, :] & (dim < D)[:, None], other=0.0)
        scores = tl.where(key[None, :] <= position[:, None], tl.dot(q, k) * scale, HIDDEN)
        v_at, v_mask = v_base + key[:, None] * v_t, live[:, None] & (dim < D)[None, :]
        m, l, acc, skip = _step(scores, real, m, l, acc, limit, v_at, v_mask)
        tl.store(done + step, skip.to(tl.int8))
    mean = acc / tl.maximum(l, 1.0e-30)[:, None]
    out = out_ptr + (lane * q_len + token)[:, None] * D + dim[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def skip_decode_kernel(
    q_ptr,  # [B, H, 1, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,
    limit_ptr,  # [B] fp32, log2 of the threshold
    len_ptr,  # [B] or None
    part_ptr,  # [B, H, splits, D] fp32
    lse_ptr,  # [B, H, splits]
    done_ptr,  # [B, G, 1, key tiles] int8
    k_len,
    key_tiles,
    groups,
    scale,  # holds log2(e)
    q_b,
    q_h,
    k_b,
    k_g,
    k_t,
    v_b,
    v_g,
    v_t,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The query heads of one KV head over one range of its keys, in whole tiles."""
    lane = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    b = lane // groups
    g = lane % groups
    limit = tl.load(limit_ptr + b)
    length = text_length(len_ptr, b, k_len)
    chunk = tl.cdiv(key_tiles, splits)
    start = split * chunk
    end = tl.minimum(start + chunk, tl.cdiv(length, KEYS))
    member = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    inner = tl.arange(0, KEYS)
    h = g * GROUP + member
    real = member < GROUP
    mask = real[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + b * q_b + h[:, None] * q_h + dim[None, :], mask=mask, other=0.0)
    k_base = k_ptr + b * k_b + g * k_g + dim[:, None]
    v_base = v_ptr + b * v_b + g * v_g + dim[None, :]
    m = tl.full([BLOCK_G], HIDDEN, tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for step in tl.range(start, end):
        key = (step * KEYS + inner).to(tl.int64)
        live = key < length
        k = tl.load(k_base + key[None, :] * k_t, mask=live[None, :] & (dim < D)[:, None], other=0.0)
        scores = tl.where(live[None, :], tl.dot(q, k) * scale, HIDDEN)
        v_at, v_mask = v_base + key[:, None] * v_t, live[:, None] & (dim < D)[None, :]
        m, l, acc, skip = _step(scores, real, m, l, acc, limit, v_at, v_mask)
        tl.store(done_ptr + lane * key_tiles + step, skip.to(tl.int8))
    some = tl.maximum(l, 1.0e-30)  # an empty range has l = 0 and weighs nothing in the combine
    row = ((b * groups * GROUP + h) * splits + split)[:, None]
    tl.store(part_ptr + row * D + dim[None, :], acc / some[:, None], mask=mask)
    tl.store(lse_ptr + row, (m + tl.math.log2(some))[:, None], mask=real[:, None])
