"""Triton code of `antidiagonal`: sums of each row by block of keys, shares by block, and the blocks
that hold a share of them."""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN


@triton.jit
def block_lse_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, G, T, D]
    lse_ptr,  # [B, H, rows, blocks] fp32: log2 of each row's sum over each block of keys
    q_len,
    k_len,
    first_row,  # strided row of the text that the first row of lse is
    rows,
    blocks,
    heads,
    scale,  # holds log2(e) and the stride
    q_b,
    q_h,
    q_t,
    k_b,
    k_g,
    k_t,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,  # strided rows of a block
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,  # strided rows and columns of a tile, whole blocks
):
    """TILE strided rows of one head against all that they see."""
    lane = tl.program_id(1).to(tl.int64)
    b = lane // heads
    h = lane % heads
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest first
    dim = tl.arange(0, BLOCK_D)
    inner = tl.arange(0, TILE)
    row = tile * TILE + inner
    u = first_row + row
    q_base = q_ptr + b * q_b + h * q_h + dim[None, :]
    k_base = k_ptr + b * k_b + h // GROUP * k_g + dim[:, None]
    per_tile: tl.constexpr = TILE // ROWS
    out = lse_ptr + (lane * rows + row)[:, None] * blocks
    # The grid of columns begins at the text, that of rows at the first query block.
    for start in tl.range(0, first_row + tile * TILE + TILE, TILE):
        v = start + inner
        scores = tl.zeros([TILE, TILE], tl.float32)
        for m in tl.range(0, STRIDE):
            token = u * STRIDE + STRIDE - 1 - m - (k_len - q_len)
            live = ((token >= 0) & (token < q_len))[:, None] & (dim < D)[None, :]
            q = tl.load(q_base + token[:, None].to(tl.int64) * q_t, mask=live, other=0.0)
            key = v * STRIDE + m
            some = (key < k_len)[None, :] & (dim < D)[:, None]
            k = tl.load(k_base + key[None, :].to(tl.int64) * k_t, mask=some, other=0.0)
            scores = tl.dot(q, k, scores)
        seen = (v[None, :] <= u[:, None]) & (v * STRIDE < k_len)[None, :]
        scores = tl.where(seen, scores * scale, HIDDEN)
        by_block = tl.reshape(scores, [TILE, per_tile, ROWS])
        top = tl.max(by_block, 2)
        total = tl.sum(tl.math.exp2(by_block - top[:, :, None]), 2)
        # A block without a visible key keeps HIDDEN, and so has no share.
        lse = tl.where(top > HIDDEN * 0.5, top + tl.math.log2(total), HIDDEN)
        block = start // ROWS + tl.arange(0, per_tile)
        inside = (row < rows)[:, None] & (block < blocks)[None, :]
        tl.store(out + block[None, :], lse, mask=inside)


@triton.jit
def share_kernel(
    lse_ptr,  # [B, H, rows, blocks] fp32; defined for blocks up to a row's own
    sum_ptr,  # [B, H, query blocks, blocks] fp32
    q_len,
    k_len,
    first,  # number of the first query block
    blocks,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One block of queries: its rows' shares of every block, summed over the rows."""
    lane = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0)
    own = first + number
    row = tl.arange(0, ROWS)
    token = (own * ROWS + row) * STRIDE
    real = (token < k_len) & (token + STRIDE > k_len - q_len)
    base = lse_ptr + ((lane * tl.num_programs(0) + number) * ROWS + row)[:, None] * blocks
    m = tl.full([ROWS], HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, own + 1, BLOCK_J):
        block = start + tl.arange(0, BLOCK_J)
        lse = tl.load(base + block[None, :], mask=(block <= own)[None, :], other=HIDDEN)
        m_new = tl.maximum(m, tl.max(lse, 1))
        l = l * tl.math.exp2(m - m_new) + tl.sum(tl.math.exp2(lse - m_new[:, None]), 1)
        m = m_new
    total = m + tl.math.log2(l)
    out = sum_ptr + (lane * tl.num_programs(0) + number) * blocks
    for start in tl.range(0, blocks, BLOCK_J):
        block = start + tl.arange(0, BLOCK_J)
        lse = tl.load(base + block[None, :], mask=(block <= own)[None, :], other=HIDDEN)
        share = tl.where(real[:, None], tl.math.exp2(lse - total[:, None]), 0.0)
        tl.store(out + block, tl.sum(share, 0), mask=block < blocks)


@triton.jit
def cover_kernel(
    sum_ptr,  # [B, H, query blocks, blocks] fp32
    share_ptr,  # [H] fp64
    out_ptr,  # [B, H, query blocks, blocks] uint8
    heads,
    first,  # number of the first query block
    blocks,
    BLOCKS_POW2: tl.constexpr,
):
    """The chosen blocks of one block of queries.

    A block joins if those that are heavier, or as heavy and lower, do not yet hold the goal. The
    lightest that joins is found by bisection of the bits of its weight.
    """
    lane = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0)
    own = first + number
    block = tl.arange(0, BLOCKS_POW2)
    at = (lane * tl.num_programs(0) + number) * blocks + block
    weight = tl.load(sum_ptr + at, mask=block < blocks, other=0.0)
    exact = weight.to(tl.float64)
    goal = tl.load(share_ptr + lane % heads) * tl.sum(exact, 0)
    always = (block == 0) | (block == own)
    free = (block < own) & (block > 0)
    forced = tl.sum(tl.where(always, exact, 0.0), 0)
    bits = tl.where(free, (weight + 0.0).to(tl.int32, bitcast=True), -1)
    exact = tl.where(free, exact, 0.0)
    # The smallest bits so that what is heavier holds less than the goal.
    cut = tl.zeros([1], tl.int32)
    bit = tl.full([1], 0x40000000, tl.int32)
    for _ in range(31):
        trial = cut | bit
        held = forced + tl.sum(tl.where(bits >= trial, exact, 0.0), 0)
        cut = tl.where(held >= goal, trial, cut)
        bit = bit >> 1
    above = bits > cut
    equal = bits == cut
    rank = (tl.cumsum(equal.to(tl.int32), 0) - 1).to(tl.float64)
    held = forced + tl.sum(tl.where(above, exact, 0.0), 0)
    joins = above | (equal & (held + rank * exact < goal))
    tl.store(out_ptr + at, (joins | always).to(tl.uint8), mask=block < blocks)
