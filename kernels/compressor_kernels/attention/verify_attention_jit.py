"""Triton code of `verify_attention`: a few queries over ranges of keys, shares of each key, and the
keys with the largest shares.

A share's bits, as those of a float that is not negative, are ordered as shares are. They are cut
into four digits: the exponent, and 7, 8 and 8 bits. A pass over shares counts, for every value of a
digit, the keys whose digits before are those of the last share that is taken. The last digit is
counted by part of the keys, so that each part knows the last share to the bit and how many keys the
parts before it take. Of the first two digits many keys have the same, which histograms of a warp
count; the others are counted by additions in memory.

EARLY: a kernel starts while the one before it ends, and waits for what that wrote.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compressor_kernels.attention.head_attention_jit import HIDDEN

BINS = tl.constexpr(256)  # places for the values of a digit
RAISED = tl.constexpr(15.0)  # the largest weight is 2 ** RAISED, so that fp16 has small ones, too


@triton.jit
def verify_kernel(
    q_ptr,  # [B, G, rows, D]: the queries of the heads of a KV head, dense
    k_ptr,  # [B, G, T, D]
    v_ptr,
    kept_ptr,  # [B, G, rows, T] fp16
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
        tl.store(kept + at[None, :], p.to(tl.float16), mask=real[:, None] & live[None, :])
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
    kept_ptr,  # [B, G, ROWS, T] fp16
    top_ptr,  # [B, G, tiles, ROWS] fp32
    sum_ptr,  # [B, G, ROWS] fp32
    out_ptr,  # [B, G, T] fp32
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
    tl.store(out_ptr + lane * k_len + key, shares, mask=live)


@triton.jit
def _bits(shares):
    return (shares + 0.0).to(tl.int32, bitcast=True)  # -0.0 is 0.0


@triton.jit
def _tally(tally_ptr, digit, counted, WIDTH: tl.constexpr, MANY: tl.constexpr):
    """Add the digits, of WIDTH bits, of the counted keys to a tally. No share is 2 or more: an
    exponent has 7 bits."""
    digit = digit & ((1 << WIDTH) - 1)
    if MANY:
        value = tl.arange(0, 1 << WIDTH)
        count = tl.histogram(digit, 1 << WIDTH, mask=counted)
        tl.atomic_add(tally_ptr + value, count, mask=count > 0, sem="relaxed")
    else:
        tl.atomic_add(tally_ptr + digit, 1, mask=counted, sem="relaxed")


@triton.jit
def _last_digit(count, value, room):
    """The digit of the last share that is taken, if `room` are taken from those that are counted,
    the largest first; and how many are taken of those that share it."""
    above = tl.sum(count, 0) - tl.cumsum(count, 0)  # with a larger digit
    digit = tl.min(tl.where(above < room, value, 255), 0)
    return digit, room - tl.sum(tl.where(value > digit, count, 0), 0)


@triton.jit
def _share_bits(share_ptr, lane, keys, row, PART: tl.constexpr):
    """Bits of a part's shares, negative past the last of them."""
    key = tl.program_id(0) * PART + tl.arange(0, PART)
    share = tl.load(share_ptr + lane * row + key, mask=key < row, other=0.0)
    return tl.where(key < keys, _bits(share), -1), key


@triton.jit
def count_kernel(
    share_ptr,  # [lanes, row] fp32
    tally_ptr,  # [(3 + parts) * lanes, BINS] int32: three digits by lane, the fourth by part, too
    cut_ptr,  # [3, lanes, 2] int32: first digits of the last share taken, how many share these
    above_ptr,  # [lanes, parts] int32: shares of a part above the last by its first three digits
    lanes,
    keys,  # that are chosen from
    row,
    best,
    PASS: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Count a digit of the shares whose digits before are those of the last that is taken."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    WIDTH: tl.constexpr = 7 if PASS < 2 else 8
    SHIFT: tl.constexpr = 23 if PASS == 0 else 8 * (3 - PASS)
    BEFORE: tl.constexpr = 7 if PASS < 3 else 8  # bits of the digit before
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    lane = tl.program_id(1).to(tl.int64)
    bits, _ = _share_bits(share_ptr, lane, keys, row, PART)
    if PASS == 0:
        counted = bits >= 0
    else:
        value = tl.arange(0, 1 << BEFORE)
        count = tl.load(tally_ptr + ((PASS - 1) * lanes + lane) * BINS + value)
        if PASS == 1:
            digit, room = _last_digit(count, value, best)
            first = digit
        else:
            at = cut_ptr + ((PASS - 2) * lanes + lane) * 2
            digit, room = _last_digit(count, value, tl.load(at + 1))
            first = (tl.load(at) << BEFORE) | digit
        if part == 0:
            at = cut_ptr + ((PASS - 1) * lanes + lane) * 2
            tl.store(at, first)
            tl.store(at + 1, room)
        counted = (bits >> (SHIFT + WIDTH)) == first
        if PASS == 3:
            above = (bits >> (SHIFT + WIDTH)) > first
            tl.store(above_ptr + lane * parts + part, tl.sum(above.to(tl.int32), 0))
    if PASS < 3:
        tally_ptr += (PASS * lanes + lane) * BINS
    else:
        tally_ptr += (3 * lanes + lane * parts + part) * BINS
    _tally(tally_ptr, bits >> SHIFT, counted, WIDTH, PASS < 2)


@triton.jit
def take_kernel(
    share_ptr,
    tally_ptr,
    cut_ptr,
    above_ptr,
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
    if EARLY:
        gdc_wait()
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    lane = tl.program_id(1).to(tl.int64)
    out = out_ptr + lane * (best + length - keys)
    if best > 0:
        bits, key = _share_bits(share_ptr, lane, keys, row, PART)
        other = tl.arange(0, PARTS_POW2)
        value = tl.arange(0, BINS)
        at = tally_ptr + (3 * lanes + lane * parts + other)[:, None] * BINS + value[None, :]
        counts = tl.load(at, mask=other[:, None] < parts, other=0)
        cut = cut_ptr + (2 * lanes + lane) * 2
        digit, room = _last_digit(tl.sum(counts, 0), value, tl.load(cut + 1))
        last = (tl.load(cut) << 8) | digit
        above = tl.load(above_ptr + lane * parts + other, mask=other < parts, other=0)
        above += tl.sum(tl.where(value[None, :] > digit, counts, 0), 1)
        equal = tl.sum(tl.where(value[None, :] == digit, counts, 0), 1)
        above_before = tl.sum(tl.where(other < part, above, 0), 0)
        equal_before = tl.sum(tl.where(other < part, equal, 0), 0)
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
