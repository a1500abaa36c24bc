"""Triton code of `activations`: tokens to int8 or E4M3 with their scales, in one pass."""

import triton
import triton.language as tl

from compressor_kernels.triton.rounding_jit import (
    divide,
    e4m3_nearest,
    int8_nearest,
    magnitude_bits,
)


@triton.jit
def tokens_kernel(
    x_ptr,  # [count, K]
    codes_ptr,  # [count, K] int8 or uint8
    scales_ptr,  # [count] fp32; one value if STATIC
    count,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # K or the next power of two
    INT8: tl.constexpr,
    STATIC: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: ROWS tokens, or groups of a token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    inside = (row < count)[:, None] & (k < K)[None, :]
    at = row[:, None] * K + k[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    largest: tl.constexpr = 127.0 if INT8 else 448.0
    if STATIC:
        scale = tl.load(scales_ptr + tl.zeros((ROWS,), tl.int32))
    else:
        absmax = tl.max(magnitude_bits(x), 1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(absmax, tl.full((ROWS,), largest, tl.float32))
        scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
        tl.store(scales_ptr + row, scale, mask=row < count)
    reciprocal = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)
    steps = divide(x, scale[:, None], reciprocal[:, None], ASM)
    # The conversion to E4M3 saturates; int8 codes of a scale of their own need not.
    if STATIC if INT8 else not ASM:
        lowest: tl.constexpr = -128.0 if INT8 else -448.0
        steps = tl.where(steps < lowest, lowest, tl.where(steps > largest, largest, steps))
    codes = int8_nearest(steps) if INT8 else e4m3_nearest(steps, ASM)
    tl.store(codes_ptr + at, codes, mask=inside)
