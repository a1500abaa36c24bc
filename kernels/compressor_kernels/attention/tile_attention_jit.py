"""Triton code of `tile_attention`: softmax over listed blocks of keys, 128 queries at a time."""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN, _online_softmax


@triton.jit
def tile_prefill_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,
    list_ptr,  # [B, H, query blocks, blocks] int32, ascending, the own block last
    count_ptr,  # [B, H, query blocks] int32
    out_ptr,  # [B, H, Tq, D], dense
    q_len,
    k_len,
    first,
    blocks,
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
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries of one head. The heads of a block run side by side, so that those of a
    KV head find each other's keys in L2; later blocks, which have more to do, go first."""
    lane = tl.program_id(0).to(tl.int64)
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    b = lane // heads
    h = lane % heads
    g = h // GROUP
    own = first + number
    position = own * BLOCK + tl.arange(0, BLOCK)
    token = position - (k_len - q_len)
    dim = tl.arange(0, BLOCK_D)
    mask = ((token >= 0) & (token < q_len))[:, None] & (dim < D)[None, :]
    q_at = q_ptr + b * q_b + h * q_h + token[:, None].to(tl.int64) * q_t + dim[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)
    k_base = k_ptr + b * k_b + g * k_g + dim[:, None]
    v_base = v_ptr + b * v_b + g * v_g + dim[None, :]
    listed = list_ptr + (lane * tl.num_programs(1) + number) * blocks
    count = tl.load(count_ptr + lane * tl.num_programs(1) + number)
    steps: tl.constexpr = BLOCK // BLOCK_N
    inner = tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK], HIDDEN, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    # Every block but the last lies in all rows' past.
    for step in tl.range(0, (count - 1) * steps):
        key = tl.load(listed + step // steps) * BLOCK + step % steps * BLOCK_N + inner
        at = key.to(tl.int64)
        k = tl.load(k_base + at[None, :] * k_t, mask=(dim < D)[:, None], other=0.0)
        p, m, l, acc = _online_softmax(tl.dot(q, k), m, l, acc, scale)
        v = tl.load(v_base + at[:, None] * v_t, mask=(dim < D)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
    for step in tl.range(0, steps):
        key = own * BLOCK + step * BLOCK_N + inner
        at = key.to(tl.int64)
        live = key < k_len
        k = tl.load(k_base + at[None, :] * k_t, mask=live[None, :] & (dim < D)[:, None], other=0.0)
        scores = tl.where(key[None, :] <= position[:, None], tl.dot(q, k), HIDDEN)
        p, m, l, acc = _online_softmax(scores, m, l, acc, scale)
        v = tl.load(v_base + at[:, None] * v_t, mask=live[:, None] & (dim < D)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
    mean = acc / tl.maximum(l, 1.0e-30)[:, None]
    out = out_ptr + (lane * q_len + token)[:, None] * D + dim[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=mask)
