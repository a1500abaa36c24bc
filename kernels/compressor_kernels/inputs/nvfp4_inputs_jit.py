"""Triton code of `nvfp4_inputs`.

A program's blocks are [ROWS, 8, 2], channel 8h + i of a row at [i, h]: so one thread loads both
halves of its blocks, and no row's scale is worked out twice.
"""

import triton
import triton.language as tl

from compressor_kernels.triton.rounding_jit import (
    divide,
    e2m1_nearest,
    e4m3_nearest,
    e4m3_value,
    magnitude_bits,
)


@triton.jit
def _candidate(x, steps, second, ASM: tl.constexpr):
    """Blocks under E4M3(steps): magnitudes of E2M1, the scale's byte, and what it multiplies
    with."""
    byte = e4m3_nearest(tl.where(steps > 448.0, 448.0, steps), ASM)
    product = second * e4m3_value(byte, ASM)
    by = tl.where(product == 0.0, 0.0, tl.div_rn(1.0, tl.where(product == 0.0, 1.0, product)))
    y = tl.abs(x) * by[:, None, None]
    y = tl.where(y > 6.0, 6.0, y)
    return e2m1_nearest(y), byte, product


@triton.jit
def _error(x, values, scale, RULE: tl.constexpr):
    away = values * scale[:, None, None] - tl.abs(x)
    if RULE == 1:
        first, last = tl.split(away)
        return tl.sum(tl.fma(first, first, last * last), 1)
    elif RULE == 2:
        return tl.sum(tl.sum(tl.abs(away), 2), 1)
    else:
        return tl.max(tl.max(tl.abs(away), 2), 1)


@triton.jit
def inputs_kernel(
    x_ptr,  # [blocks, 16]
    amax_ptr,  # fp32 [1]
    codes_ptr,  # int32 [blocks, 2], eight codes each
    scales_ptr,  # uint8 [blocks]
    second_ptr,  # fp32 [1]
    blocks,
    ROWS: tl.constexpr,
    RULE: tl.constexpr,  # 0: static_6, 1: mse, 2: mae, 3: abs_max
    RANGE: tl.constexpr,
    DIVISOR_MAX: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: ROWS blocks of 16 neighbouring channels."""
    amax = tl.load(amax_ptr)
    divisor = tl.div_rn(RANGE, amax)
    divisor = tl.where(divisor > DIVISOR_MAX, DIVISOR_MAX, divisor)
    divisor = tl.where(amax == 0.0, 1.0, divisor)
    second = tl.div_rn(1.0, divisor)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) == 0:
        tl.store(second_ptr, second)
    column = tl.arange(0, 8)
    inside = row < blocks
    at = row[:, None] * 16 + column[None, :]
    first = tl.load(x_ptr + at, mask=inside[:, None], other=0.0)
    last = tl.load(x_ptr + at + 8, mask=inside[:, None], other=0.0)
    x = tl.join(first, last).to(tl.float32)
    absmax = tl.max(tl.max(magnitude_bits(x), 2), 1).to(tl.float32, bitcast=True)
    steps = divide(absmax, 6.0, 0.16666667163372040, ASM) * divisor
    values, byte, scale = _candidate(x, steps, second, ASM)
    if RULE > 0:
        four, other_byte, other_scale = _candidate(x, steps * 1.5, second, ASM)
        better = _error(x, four, other_scale, RULE) < _error(x, values, scale, RULE)
        values = tl.where(better[:, None, None], four, values)
        byte = tl.where(better, other_byte, byte)
        scale = tl.where(better, other_scale, scale)
    # Times 2^-126 the eight values are the eight smallest multiples of half of fp32's normals,
    # whose bits, shifted, count them as E2M1 does: it has the same exponents, two bits wide.
    codes = (values * 1.1754943508222875e-38).to(tl.uint32, bitcast=True)
    nibble = (column * 4)[None, :, None]
    packed = tl.sum((codes >> 22) << nibble, 1)
    # A negative value that rounds to zero keeps its sign, unless its block's scale is zero;
    # adding 0 takes it from -0.0.
    signs = tl.sum(((x + 0.0).to(tl.uint32, bitcast=True) >> 31) << (nibble + 3), 1)
    packed = packed | tl.where((scale == 0.0)[:, None], 0, signs)
    at = row[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(codes_ptr + at, packed, mask=inside[:, None])
    tl.store(scales_ptr + row, byte, mask=inside)
