"""Triton code of `nvfp4_inputs`.

Values are rounded by adding, and taking away again, a power of two so large that no bits below
the wanted step remain: the step is half of the power of two at or below the magnitude, and at
least 0.5.
"""

import triton
import triton.language as tl

from compressor_kernels.rounding_jit import divide, e4m3_nearest, e4m3_value, magnitude_bits


@triton.jit
def _candidate(x, steps, second, ASM: tl.constexpr):
    """Blocks [ROWS, 16] under E4M3(steps): magnitudes of E2M1, the scale's byte, and what it
    multiplies with."""
    byte = e4m3_nearest(tl.where(steps > 448.0, 448.0, steps), ASM)
    product = second * e4m3_value(byte, ASM)
    by = tl.where(product == 0.0, 0.0, tl.div_rn(1.0, tl.where(product == 0.0, 1.0, product)))
    y = tl.abs(x) * by[:, None]
    y = tl.where(y > 6.0, 6.0, y)
    # 1.5 · 2^23 steps: 2^(e-1) of them for a magnitude of 2^e
    anchor = (y.to(tl.int32, bitcast=True) & 0x7F800000) + ((22 << 23) | 0x400000)
    anchor = tl.maximum(anchor, (149 << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (y + anchor) - anchor, byte, product


@triton.jit
def _error(x, values, scale, RULE: tl.constexpr):
    away = tl.abs(values * scale[:, None] - tl.abs(x))
    if RULE == 1:
        return tl.sum(away * away, 1)
    elif RULE == 2:
        return tl.sum(away, 1)
    else:
        return tl.max(away, 1)


@triton.jit
def inputs_kernel(
    x_ptr,  # [blocks, 16]
    amax_ptr,  # fp32 [1]
    codes_ptr,  # uint8 [blocks, 8]
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
    column = tl.arange(0, 16)
    inside = row < blocks
    at = row[:, None] * 16 + column[None, :]
    x = tl.load(x_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    absmax = tl.max(magnitude_bits(x), 1).to(tl.float32, bitcast=True)
    steps = divide(absmax, 6.0, 0.16666667163372040, ASM) * divisor
    values, byte, scale = _candidate(x, steps, second, ASM)
    if RULE > 0:
        four, other_byte, other_scale = _candidate(x, steps * 1.5, second, ASM)
        better = _error(x, four, other_scale, RULE) < _error(x, values, scale, RULE)
        values = tl.where(better[:, None], four, values)
        byte = tl.where(better, other_byte, byte)
        scale = tl.where(better, other_scale, scale)
    # Times 2^-126 the eight values are the eight smallest multiples of half of fp32's normals,
    # whose bits, shifted, count them as E2M1 does: it has the same exponents, two bits wide.
    codes = (values * 1.1754943508222875e-38).to(tl.int32, bitcast=True) >> 22
    # A negative value that rounds to zero keeps its sign, unless its block's scale is zero.
    negative = (x < 0.0) & (scale != 0.0)[:, None]
    codes = codes | tl.where(negative, 8, 0)
    even, odd = tl.split(tl.reshape(codes, (ROWS, 8, 2)))
    packed = (even | (odd << 4)).to(tl.uint8)
    at = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(codes_ptr + at, packed, mask=inside[:, None])
    tl.store(scales_ptr + row, byte, mask=inside)
