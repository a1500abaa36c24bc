"""Triton code of `verify_attention`: a few queries over ranges of keys, shares of each key, and the
keys with the largest shares.

The bits of a 16-bit float that is not negative are ordered as such floats are, and of those up to 1
they are 14. They are cut into two digits of 7 bits. A pass over shares counts, by part of the keys,
how many have each value of a digit, the second pass those alone whose first digit is that of the
last share that is taken. Then each part knows the last share to the bit, and how many keys the
parts before it take.

EARLY: a kernel starts while the one before it ends, and waits for what that wrote.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compressor_kernels.attention.head_attention_jit import HIDDEN

DIGIT = tl.constexpr(7)  # bits
BINS = tl.constexpr(1 << 7)  # values


@triton.jit
def verify_kernel(
    q_ptr,  # [B, G, rows, D]: the queries of the heads of a KV head, dense
    k_ptr,  # [B, G, T, D]
    v_ptr,
    kept_ptr,  # [B, G, rows, T] E4M3 or fp16
    top_ptr,  # [B, G, tiles, rows] fp32
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
    RAISED: tl.constexpr,  # the largest weight that is kept is 2 ** RAISED, so that small ones fit
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
    kept = kept_ptr + (lane * rows + row)[:, None] * k_len
    tops = top_ptr + lane * tl.cdiv(k_len, BLOCK_N) * rows + row
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
        m_new = tl.maximum(m, tl.max(scores, 1) - RAISED)
        p = tl.where(seen, tl.math.exp2(scores - m_new[:, None]), 0.0)
        tl.store(
            kept + at[None, :], p.to(kept_ptr.dtype.element_ty), mask=real[:, None] & live[None, :]
        )
        tl.store(tops + base // BLOCK_N * rows, m_new, mask=real)
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
    kept_ptr,  # [B, G, ROWS, T] E4M3 or fp16
    top_ptr,  # [B, G, tiles, ROWS] fp32
    sum_ptr,  # [B, G, ROWS] fp32
    out_ptr,  # [B, G, T] bf16
    k_len,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Shares of the keys of some tiles. Rows are unrolled, so that many loads are on their way at
    once."""
    if EARLY:
        gdc_launch_dependents()
    lane = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tiles = tl.cdiv(k_len, TILE)
    key = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    live = key < k_len
    shares = tl.zeros([TILES, TILE], tl.float32)
    for row in tl.static_range(ROWS):
        kept = tl.load(kept_ptr + (lane * ROWS + row) * k_len + key, mask=live, other=0.0)
        top = tl.load(top_ptr + (lane * tiles + tile) * ROWS + row, mask=tile < tiles, other=HIDDEN)
        weight = tl.math.exp2(top - tl.load(sum_ptr + lane * ROWS + row))
        shares += kept.to(tl.float32) * weight[:, None]
    shares = shares / ROWS
    tl.store(out_ptr + lane * k_len + key, shares.to(tl.bfloat16), mask=live)


@triton.jit
def _last_digit(count, room):
    """The digit of the last share that is taken, if `room` are taken from those that are counted,
    the largest first; and how many are taken of those that share it."""
    value = tl.arange(0, BINS)
    above = tl.sum(count, 0) - tl.cumsum(count, 0)  # with a larger digit
    digit = tl.min(tl.where(above < room, value, BINS - 1), 0)
    return digit, room - tl.sum(tl.where(value > digit, count, 0), 0)


@triton.jit
def _share_bits(share_ptr, lane, keys, row, PART: tl.constexpr):
    """Bits of a part's shares, negative past the last of them."""
    key = tl.program_id(0) * PART + tl.arange(0, PART)
    share = tl.load(share_ptr + lane * row + key, mask=key < keys, other=-1).to(tl.int32)
    return tl.where(key < keys, share & 0x7FFF, -1), key  # -0.0 is 0.0


@triton.jit
def _tally(tally_ptr, lane, parts, PARTS_POW2: tl.constexpr):
    """Counts [PARTS_POW2, BINS] of a digit in all parts of a lane."""
    part = tl.arange(0, PARTS_POW2)
    at = (lane * parts + part)[:, None] * BINS + tl.arange(0, BINS)[None, :]
    return tl.load(tally_ptr + at, mask=part[:, None] < parts, other=0)


@triton.jit
def count_kernel(
    share_ptr,  # [lanes, row] bits of bf16 or fp16
    tally_ptr,  # [2, lanes, parts, BINS] int32
    lanes,
    keys,  # that are chosen from
    row,
    best,
    PASS: tl.constexpr,
    PART: tl.constexpr,
    PARTS_POW2: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Count the first digit of a part's shares, or the second of those whose first is that of the
    last that is taken."""
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    lane = tl.program_id(1).to(tl.int64)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    bits, _ = _share_bits(share_ptr, lane, keys, row, PART)
    counted = bits >= 0
    digit = bits >> DIGIT
    if PASS == 1:
        first, _ = _last_digit(tl.sum(_tally(tally_ptr, lane, parts, PARTS_POW2), 0), best)
        counted = digit == first
        digit = bits & (BINS - 1)
    count = tl.histogram(tl.where(counted, digit, 0), BINS, mask=counted)
    at = ((PASS * lanes + lane) * parts + part) * BINS
    tl.store(tally_ptr + at + tl.arange(0, BINS), count)


@triton.jit
def take_kernel(
    share_ptr,
    tally_ptr,
    out_ptr,  # [lanes, best + length - keys] int32
    lanes,
    keys,
    row,
    best,
    length,
    PART: tl.constexpr,
    PARTS_POW2: tl.constexpr,
    RECENT_POW2: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The chosen keys of a part, behind those of the parts before it; the first part also writes
    the recent keys."""
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    lane = tl.program_id(1).to(tl.int64)
    out = out_ptr + lane * (best + length - keys)
    if EARLY:
        gdc_wait()
    if best > 0:
        bits, key = _share_bits(share_ptr, lane, keys, row, PART)
        firsts = _tally(tally_ptr, lane, parts, PARTS_POW2)
        seconds = _tally(tally_ptr + lanes * parts * BINS, lane, parts, PARTS_POW2)
        first, room = _last_digit(tl.sum(firsts, 0), best)
        second, room = _last_digit(tl.sum(seconds, 0), room)
        last = (first << DIGIT) | second
        value = tl.arange(0, BINS)[None, :]
        above = tl.sum(tl.where(value > first, firsts, 0) + tl.where(value > second, seconds, 0), 1)
        equal = tl.sum(tl.where(value == second, seconds, 0), 1)
        before_this = tl.arange(0, PARTS_POW2) < part
        above_before = tl.sum(tl.where(before_this, above, 0), 0)
        equal_before = tl.sum(tl.where(before_this, equal, 0), 0)
        # Both ranks in one scan: a part has less than 1 << 15 keys.
        own = (bits > last).to(tl.int32) + ((bits == last).to(tl.int32) << 16)
        before = tl.cumsum(own, 0) - own
        rank = equal_before + (before >> 16)
        taken = (bits > last) | ((bits == last) & (rank < room))
        place = above_before + (before & 0xFFFF) + tl.minimum(rank, room)
        tl.store(out + place, key, mask=taken)
    if part == 0:
        near = tl.arange(0, RECENT_POW2)
        tl.store(out + best + near, keys + near, mask=near < length - keys)
