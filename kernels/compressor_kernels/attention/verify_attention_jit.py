"""Triton code of `verify_attention`: a few queries over ranges of keys, shares of each key, and the
keys with the largest shares.

A share's bits, as those of a float that is not negative, are ordered as shares are. They are cut
into three digits; a pass counts, for every value of a digit, the keys whose digits before are those
of the last share that is taken. After three passes this share is known to the bit.
"""

import triton
import triton.language as tl

from compressor_kernels.attention.head_attention_jit import HIDDEN

BINS = tl.constexpr(1024)  # values of a digit; the first, of 11 bits, is 1,016 at most for 1.0


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
    score_ptr,  # [B, G, ROWS, T] fp16
    sum_ptr,  # [B, G, ROWS] fp32
    out_ptr,  # [B, G, T] fp32
    k_len,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Shares of BLOCK_N keys. Rows are unrolled, so that many loads are on their way at once."""
    lane = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = key < k_len
    shares = tl.zeros([BLOCK_N], tl.float32)
    for row in tl.static_range(ROWS):
        at = score_ptr + (lane * ROWS + row) * k_len + key
        scores = tl.load(at, mask=live, other=-60000.0).to(tl.float32)
        shares += tl.math.exp2(scores - tl.load(sum_ptr + lane * ROWS + row))
    tl.store(out_ptr + lane * k_len + key, shares / ROWS, mask=live)


@triton.jit
def _digit(bits, DIGIT: tl.constexpr):
    """Digit of a share's bits, the highest first."""
    return tl.minimum((bits >> (20 - 10 * DIGIT)) & (2047 if DIGIT == 0 else 1023), BINS - 1)


@triton.jit
def _last_digit(tally_ptr, room):
    """The digit of the last share that is taken, if `room` are taken from those that are counted,
    the largest first; and how many are taken of those that share it."""
    value = tl.arange(0, BINS)
    count = tl.load(tally_ptr + value)
    above = tl.sum(count, 0) - tl.cumsum(count, 0)  # with a larger digit
    digit = tl.min(tl.where(above < room, value, BINS - 1), 0)
    return digit, room - tl.sum(tl.where(value > digit, count, 0), 0)


@triton.jit
def _against(bits, tally_ptr, lane, lanes, room, DIGITS: tl.constexpr):
    """Which shares lie above the last that is taken, by their first DIGITS digits, and which have
    all of these in common with it; and how many are taken of the latter."""
    above = bits < -1  # none
    equal = bits >= 0
    for digit in tl.static_range(DIGITS):
        last, room = _last_digit(tally_ptr + (digit * lanes + lane) * BINS, room)
        own = _digit(bits, digit)
        above = above | (equal & (own > last))
        equal = equal & (own == last)
    return above, equal, room


@triton.jit
def _share_bits(share_ptr, lane, keys, row, PART: tl.constexpr):
    """Bits of a part's shares, negative past the last of them."""
    key = tl.program_id(0) * PART + tl.arange(0, PART)
    share = tl.load(share_ptr + lane * row + key, mask=key < keys, other=0.0)
    return tl.where(key < keys, (share + 0.0).to(tl.int32, bitcast=True), -1), key


@triton.jit
def digit_kernel(
    share_ptr,  # [lanes, row] fp32
    tally_ptr,  # [3, lanes, BINS] int32
    lanes,
    keys,  # that are chosen from
    row,
    best,
    DIGIT: tl.constexpr,
    PART: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    bits, _ = _share_bits(share_ptr, lane, keys, row, PART)
    _, equal, _ = _against(bits, tally_ptr, lane, lanes, best, DIGIT)
    count = tl.histogram(_digit(bits, DIGIT), BINS, mask=equal)
    at = tally_ptr + (DIGIT * lanes + lane) * BINS + tl.arange(0, BINS)
    tl.atomic_add(at, count, mask=count > 0, sem="relaxed")


@triton.jit
def found_kernel(
    share_ptr,
    tally_ptr,
    found_ptr,  # [2, lanes, parts] int32: shares above the last that is taken, and equal to it
    lanes,
    keys,
    row,
    best,
    PART: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    bits, _ = _share_bits(share_ptr, lane, keys, row, PART)
    above, equal, _ = _against(bits, tally_ptr, lane, lanes, best, 3)
    at = found_ptr + lane * parts + tl.program_id(0)
    tl.store(at, tl.sum(above.to(tl.int32), 0))
    tl.store(at + lanes * parts, tl.sum(equal.to(tl.int32), 0))


@triton.jit
def take_kernel(
    share_ptr,
    tally_ptr,
    found_ptr,
    out_ptr,  # [lanes, best + length - keys] int32
    lanes,
    keys,
    row,
    best,
    length,
    PART: tl.constexpr,
    PARTS_POW2: tl.constexpr,
    RECENT_POW2: tl.constexpr,
):
    """The chosen keys of a part, behind those of the parts before it; the first part also writes
    the recent keys."""
    lane = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    out = out_ptr + lane * (best + length - keys)
    if best > 0:
        bits, key = _share_bits(share_ptr, lane, keys, row, PART)
        above, equal, room = _against(bits, tally_ptr, lane, lanes, best, 3)
        other = tl.arange(0, PARTS_POW2)
        at = found_ptr + lane * parts + other
        above_before = tl.sum(tl.load(at, mask=other < part, other=0), 0)
        equal_before = tl.sum(tl.load(at + lanes * parts, mask=other < part, other=0), 0)
        first_equal = tl.cumsum(equal.to(tl.int32), 0) - 1 + equal_before
        taken = above | (equal & (first_equal < room))
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        place += above_before + tl.minimum(equal_before, room)
        tl.store(out + place, key, mask=taken)
    if part == 0:
        near = tl.arange(0, RECENT_POW2)
        tl.store(out + best + near, keys + near, mask=near < length - keys)
