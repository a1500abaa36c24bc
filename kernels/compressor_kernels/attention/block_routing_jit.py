"""Triton code of `block_routing`: gates and their best, attention by block, and its merge."""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN, _online_softmax


@triton.jit
def gate_kernel(
    q_ptr,  # [B, H, Tq, D]
    mean_ptr,  # [B, G, blocks, D], dense
    out_ptr,  # [B, H, Tq, K] int32
    q_len,
    k_len,
    blocks,
    heads,
    q_b,
    q_h,
    q_t,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS_POW2: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The K best blocks of ROWS queries of one head: the best is taken K times."""
    lane = tl.program_id(1).to(tl.int64)
    b = lane // heads
    h = lane % heads
    g = b * (heads // GROUP) + h // GROUP
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    block = tl.arange(0, BLOCKS_POW2)
    live = (token < q_len)[:, None]
    q_at = q_ptr + b * q_b + h * q_h + token[:, None].to(tl.int64) * q_t + dim[None, :]
    q = tl.load(q_at, mask=live & (dim < D)[None, :], other=0.0)
    mean_at = mean_ptr + (g * blocks + block[None, :]) * D + dim[:, None]
    mean = tl.load(mean_at, mask=(block < blocks)[None, :] & (dim < D)[:, None], other=0.0)
    gate = tl.dot(q, mean)
    own = (k_len - q_len + token) // BLOCK
    gate = tl.where(block[None, :] < own[:, None], gate, float("-inf"))
    gate = tl.where(block[None, :] == own[:, None], float("inf"), gate)
    out = out_ptr + (lane * q_len + token) * K
    for slot in tl.range(0, K):
        best = tl.max(gate, 1)
        at = tl.min(tl.where(gate == best[:, None], block[None, :], BLOCKS_POW2), 1)
        found = best > float("-inf")
        tl.store(out + slot, tl.where(found, at, -1), mask=token < q_len)
        gate = tl.where(block[None, :] == at[:, None], float("-inf"), gate)


@triton.jit
def gather_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,
    entry_ptr,  # [lanes, Tq * K] int32: query * K + slot, by block
    offset_ptr,  # [lanes, blocks] int64
    count_ptr,  # [lanes, blocks] int64
    end_ptr,  # [lanes, blocks] int64: tiles up to and with each block's
    block_ptr,  # [lanes, tiles] int64: the block of a tile
    part_ptr,  # [lanes, Tq * K, D]
    lse_ptr,  # [lanes, Tq * K] fp32
    q_len,
    k_len,
    blocks,
    first,  # of all heads, the first of those that are here
    here,  # heads of a batch row that are here
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
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS of the queries that chose one block, over its keys."""
    lane = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    block = tl.load(block_ptr + lane * tl.num_programs(0) + tile)
    if block < blocks:
        at_block = lane * blocks + block
        count = tl.load(count_ptr + at_block)
        before = tl.load(end_ptr + at_block) - (count + ROWS - 1) // ROWS
        b = lane // here
        h = first + lane % here
        g = h // GROUP
        slot = (tile - before) * ROWS + tl.arange(0, ROWS)
        real = slot < count
        entries = q_len * K
        at = lane * entries + tl.load(offset_ptr + at_block) + slot
        entry = tl.load(entry_ptr + at, mask=real, other=0)
        token = (entry // K).to(tl.int64)
        position = k_len - q_len + token
        dim = tl.arange(0, BLOCK_D)
        inner = tl.arange(0, BLOCK_N)
        mask = real[:, None] & (dim < D)[None, :]
        q_at = q_ptr + b * q_b + h * q_h + token[:, None] * q_t + dim[None, :]
        q = tl.load(q_at, mask=mask, other=0.0)
        k_base = k_ptr + b * k_b + g * k_g + dim[:, None]
        v_base = v_ptr + b * v_b + g * v_g + dim[None, :]
        m = tl.full([ROWS], HIDDEN, tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for step in tl.static_range(BLOCK // BLOCK_N):
            key = block * BLOCK + step * BLOCK_N + inner
            live = key < k_len
            some = live[None, :] & (dim < D)[:, None]
            k = tl.load(k_base + key[None, :] * k_t, mask=some, other=0.0)
            scores = tl.where(key[None, :] <= position[:, None], tl.dot(q, k), HIDDEN)
            p, m, l, acc = _online_softmax(scores, m, l, acc, scale)
            some = live[:, None] & (dim < D)[None, :]
            v = tl.load(v_base + key[:, None] * v_t, mask=some, other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc)
        row = lane * entries + entry
        mean = acc / l[:, None]
        out = part_ptr + row[:, None] * D + dim[None, :]
        tl.store(out, mean.to(part_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + row, m + tl.math.log2(l), mask=real)


@triton.jit
def merge_kernel(
    part_ptr,  # [lanes, Tq, K, D]
    lse_ptr,  # [lanes, Tq, K] fp32; HIDDEN where a slot holds no block
    out_ptr,  # [B, H, Tq, D], dense
    q_len,
    heads,
    first,
    here,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS queries of one head: their blocks together, always in the same order."""
    lane = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = token < q_len
    dim = tl.arange(0, BLOCK_D)
    row = (lane * q_len + token) * K
    m = tl.full([ROWS], HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for slot in tl.range(0, K):
        lse = tl.load(lse_ptr + row + slot, mask=live, other=HIDDEN)
        there = lse > HIDDEN * 0.5
        some = there[:, None] & (dim < D)[None, :]
        part = tl.load(part_ptr + (row + slot)[:, None] * D + dim[None, :], mask=some, other=0.0)
        m_new = tl.maximum(m, lse)
        fade = tl.math.exp2(m - m_new)
        weight = tl.where(there, tl.math.exp2(lse - m_new), 0.0)
        acc = acc * fade[:, None] + part.to(tl.float32) * weight[:, None]
        l = l * fade + weight
        m = m_new
    head = lane // here * heads + first + lane % here
    out = out_ptr + (head * q_len + token)[:, None] * D + dim[None, :]
    mean = acc / tl.maximum(l, 1.0e-30)[:, None]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dim < D)[None, :])
