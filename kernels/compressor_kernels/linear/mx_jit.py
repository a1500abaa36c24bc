"""Triton code of `mx`: codes and powers of two to exact bf16 values in registers, and back."""

import triton
import triton.language as tl

from compressor_kernels.triton.rounding_jit import (
    e2m1_nearest,
    e4m3_nearest,
    e4m3_value,
    magnitude_bits,
)


@triton.jit
def _power(byte):
    """2^(byte - 127) in fp32; 255 is NaN, 0 a subnormal."""
    word = byte.to(tl.int32)
    bits = tl.where(word == 0, 0x00400000, word << 23)
    return tl.where(word == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_value(code):
    """Codes 0 ... 15 to fp32."""
    index = code & 7
    exponent = index >> 1
    quarters = tl.where(exponent > 0, (2 + (index & 1)) << exponent, (index & 1) * 2)
    value = quarters.to(tl.float32) * 0.25
    return tl.where(code > 7, -value, value)


@triton.jit
def product_kernel(
    x_ptr,  # bf16 [M, I]
    codes_ptr,  # uint8 [O, I/2] if FP4, else E4M3 bytes [O, I]
    exponents_ptr,  # uint8 [O, I/32]
    bias_ptr,  # [O] or None
    out_ptr,  # [M, O]
    M,
    O,
    I: tl.constexpr,
    FP4: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BM tokens by BN outputs."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = n.to(tl.int64)[:, None]
    sums = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, I, BK):
        k = start + tl.arange(0, BK)
        x_at = x_ptr + m.to(tl.int64)[:, None] * I + k[None, :]
        x = tl.load(x_at, mask=(m < M)[:, None] & (k < I)[None, :], other=0.0)
        inside = (n < O)[:, None] & (k < I)[None, :]
        if FP4:
            byte = tl.load(codes_ptr + row * (I // 2) + k[None, :] // 2, mask=inside, other=0)
            value = _e2m1_value((byte.to(tl.int32) >> ((k & 1) * 4)[None, :]) & 15)
        else:
            byte = tl.load(codes_ptr + row * I + k[None, :], mask=inside, other=0)
            value = e4m3_value(byte, ASM)
        exponent = tl.load(
            exponents_ptr + row * (I // 32) + k[None, :] // 32, mask=inside, other=127
        )
        value = tl.where(inside, value * _power(exponent), 0.0)
        if ASM:
            sums = tl.dot(x, value.to(tl.bfloat16).T, sums)
        else:
            sums += tl.dot(x.to(tl.float32), value.T)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * O + n[None, :]
    tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < O)[None, :])


@triton.jit
def _code(x, inverse, FP4: tl.constexpr, ASM: tl.constexpr):
    """Values [R, n] in units of their groups' scales [R], as codes in uint8."""
    y = x * inverse[:, None]
    if FP4:
        magnitude = tl.abs(y)
        magnitude = e2m1_nearest(tl.where(magnitude > 6.0, 6.0, magnitude))
        # Times 2^-126 the eight values are the eight smallest multiples of half of fp32's normals,
        # whose bits, shifted, count them as E2M1 does.
        index = (magnitude * 1.1754943508222875e-38).to(tl.uint32, bitcast=True) >> 22
        return index.to(tl.uint8) | (tl.where(x < 0.0, 8, 0)).to(tl.uint8)
    y = tl.where(y > 448.0, 448.0, tl.where(y < -448.0, -448.0, y))
    return e4m3_nearest(y, ASM)


@triton.jit
def inputs_kernel(
    x_ptr,  # [groups, 32]
    codes_ptr,  # uint8 [groups, 16] if FP4, else [groups, 32]
    exponents_ptr,  # uint8 [groups]
    groups,
    FP4: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUND_UP: tl.constexpr,
    ROWS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: ROWS groups of 32 neighbouring channels, even and odd ones apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, 16)
    inside = (row < groups)[:, None]
    at = row[:, None] * 32 + 2 * pair[None, :]
    even = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + at + 1, mask=inside, other=0.0).to(tl.float32)
    bits = tl.maximum(tl.max(magnitude_bits(even), 1), tl.max(magnitude_bits(odd), 1))
    byte = (bits >> 23) - TOP + tl.where((bits & 0x7FFFFF) >= ROUND_UP, 1, 0)
    byte = tl.minimum(tl.maximum(byte, 0), LARGEST)
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    low = _code(even, inverse, FP4, ASM)
    high = _code(odd, inverse, FP4, ASM)
    if FP4:
        tl.store(codes_ptr + row[:, None] * 16 + pair[None, :], low | (high << 4), mask=inside)
    else:
        tl.store(codes_ptr + at, low, mask=inside)
        tl.store(codes_ptr + at + 1, high, mask=inside)
    byte = tl.where(bits >= 0x7F800000, 255, byte)
    tl.store(exponents_ptr + row, byte.to(tl.uint8), mask=row < groups)
