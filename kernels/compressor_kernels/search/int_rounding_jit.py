"""Triton code of `int_rounding`: grid, codes and errors of groups of weights, in registers.

Launched without fused multiply-adds: PyTorch rounds products before it adds to them.
"""

import triton
import triton.language as tl

from compressor_kernels.search.awq_candidate_jit import HUGE, RANGE_FLOOR, TINY, _nearest, _storable


@triton.jit
def _stored(scale, STORED: tl.constexpr, MOST: tl.constexpr):
    """A positive scale as it will be stored, finite."""
    return _storable(tl.minimum(scale, MOST), STORED)


@triton.jit
def _over(x, scale):
    """x / scale, to the last bit."""
    return tl.div_rn(x, tl.broadcast_to(scale, x.shape))


@triton.jit
def _codes(w, scale, zero, LEVELS: tl.constexpr):
    """Nearest codes of w [R, G], as numbers."""
    steps = _nearest(_over(w, scale[:, None])) + zero[:, None]
    return tl.minimum(tl.maximum(steps, 0.0), LEVELS)


@triton.jit
def _error(w, scale, zero, inside, LEVELS: tl.constexpr):
    """Squared error of each group, float64."""
    values = (_codes(w, scale, zero, LEVELS) - zero[:, None]) * scale[:, None]
    off = values.to(tl.float64) - w.to(tl.float64)
    return tl.sum(tl.where(inside, off * off, 0.0), 1)


@triton.jit(do_not_specialize=["groups"])
def rounding_kernel(
    w_ptr,
    bound_ptr,
    signed_ptr,
    code_ptr,
    scale_ptr,
    zero_ptr,
    groups,
    INVERSE: tl.constexpr,
    MOST: tl.constexpr,
    SMALLEST: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BOUND: tl.constexpr,
    SIGNED: tl.constexpr,
    JUDGED: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS groups of SIZE weights, one after the other in memory."""
    LEVELS: tl.constexpr = 2**BITS - 1
    HALF: tl.constexpr = 2 ** (BITS - 1)
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = group < groups
    j = tl.arange(0, WIDTH)
    inside = live[:, None] & (j[None, :] < SIZE)
    at = group[:, None] * SIZE + j[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, w, float("inf")), 1)
    high = tl.max(tl.where(inside, w, float("-inf")), 1)
    if BOUND:
        bound = tl.load(bound_ptr + group, mask=live, other=1.0).to(tl.float32)
        low = tl.minimum(tl.maximum(low, -bound), bound)
        high = tl.minimum(tl.maximum(high, -bound), bound)
        w = tl.minimum(tl.maximum(w, -bound[:, None]), bound[:, None])
    # Where the extreme is positive the symmetric grid's scale is negative.
    extreme = tl.maximum(tl.maximum(-low, high), RANGE_FLOOR)
    other = _stored(extreme * (1.0 / HALF), STORED, MOST)
    mirrored = high > -low
    if SYMMETRIC:
        scale = tl.where(mirrored, -other, other)
        zero = tl.full((ROWS,), HALF, tl.float32)
    else:
        one_sign = (low >= 0) | (high <= 0)
        low = tl.minimum(low, 0.0)
        high = tl.maximum(high, 0.0)
        span = high - low
        step = tl.maximum(span, RANGE_FLOOR) * INVERSE
        scale = _stored(step, STORED, MOST)
        zero = tl.minimum(tl.maximum(-_nearest(_over(low, scale)), 0.0), LEVELS)
        degenerate = one_sign | (span < TINY) | (step < SMALLEST) | (span > HUGE)
        degenerate = degenerate & (span > 0) & live
        centre = tl.where(mirrored, LEVELS - HALF, HALF).to(tl.float32)
        better = tl.zeros((ROWS,), tl.int1)
        if JUDGED:
            error = _error(w, scale, zero, inside, LEVELS)
            better = _error(w, other, centre, inside, LEVELS) < error
            better = better | (error == float("inf"))
        elif tl.max(degenerate.to(tl.int32), 0) > 0:  # rare
            error = _error(w, scale, zero, inside, LEVELS)
            better = _error(w, other, centre, inside, LEVELS) < error
            better = degenerate & (better | (error == float("inf")))
        if SIGNED:
            better = better | (tl.load(signed_ptr + group, mask=live, other=0) != 0)
        scale = tl.where(better, other, scale)
        zero = tl.where(better, centre, zero)
        tl.store(zero_ptr + group, zero.to(tl.uint8), mask=live)
    tl.store(scale_ptr + group, scale.to(scale_ptr.dtype.element_ty), mask=live)
    codes = _codes(w, scale, zero, LEVELS)
    tl.store(code_ptr + at, codes.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["groups", "per_row", "per_weight"])
def errors_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    zero_ptr,
    by_ptr,
    delta_ptr,
    before_ptr,
    groups,
    per_row,
    per_weight,
    SIZE: tl.constexpr,
    CENTRE: tl.constexpr,
    ZEROS: tl.constexpr,
    BY: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS groups of SIZE weights. `by` is one row for each weight of a stack, of
    which each has `per_weight` groups; 0 where all have the same one."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = group < groups
    j = tl.arange(0, WIDTH)
    inside = live[:, None] & (j[None, :] < SIZE)
    at = group[:, None] * SIZE + j[None, :]
    old = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(code_ptr + at, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + group, mask=live, other=1.0).to(tl.float32)
    zero = tl.full((ROWS,), CENTRE, tl.float32)
    if ZEROS:
        zero = tl.load(zero_ptr + group, mask=live, other=0).to(tl.float32)
    new = (code - zero[:, None]) * scale[:, None]
    if BY:
        number = tl.where(per_weight > 0, group // tl.maximum(per_weight, 1), 0)
        column = (number * per_row + group % per_row)[:, None] * SIZE + j[None, :]
        by = tl.load(by_ptr + column, mask=inside, other=1.0)
        old = tl.div_rn(old, by)
        new = tl.div_rn(new, by)
    tl.store(delta_ptr + at, (new - old).to(tl.bfloat16), mask=inside)
    tl.store(before_ptr + at, old.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["groups"])
def values_kernel(
    code_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    groups,
    SIZE: tl.constexpr,
    CENTRE: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS groups of SIZE codes, one after the other in memory."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = group < groups
    j = tl.arange(0, WIDTH)
    inside = live[:, None] & (j[None, :] < SIZE)
    at = group[:, None] * SIZE + j[None, :]
    code = tl.load(code_ptr + at, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + group, mask=live, other=1.0).to(tl.float32)
    zero = tl.full((ROWS,), CENTRE, tl.float32)
    if ZEROS:
        zero = tl.load(zero_ptr + group, mask=live, other=0).to(tl.float32)
    values = (code - zero[:, None]) * scale[:, None]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)
