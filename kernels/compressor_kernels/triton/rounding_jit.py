"""Rounding to the elements of low-bit formats, to the same bits as PyTorch on a CPU.

Kernels that use these are compiled without fused multiply-adds, which would round less often than
the reference does; where one is wanted it is written out. ASM=False says the same for the
interpreter, whose casts to fp8 are not PyTorch's.
"""

import triton
import triton.language as tl

ONE = tl.constexpr(4194304.0)  # 2^22, from where floats lie 0.5 apart, E2M1's least step
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits below one


@triton.jit
def magnitude_bits(x):
    """|x| of fp32 as int32, in the order of magnitudes, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def divide(x, by, reciprocal, ASM: tl.constexpr):
    """x / by correctly rounded in three instructions, given 1 / by correctly rounded.

    The remainder of a first quotient corrects it (Markstein, 1990). Not for quotients that
    vanish or overflow.
    """
    if not ASM:
        return x / by
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, by, x), reciprocal, quotient)


@triton.jit
def int8_nearest(x):
    """fp32 within +-2^21 to the low byte of the nearest integer, ties to even."""
    return (x + NEAREST).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def e2m1_nearest(y):
    """Magnitudes to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to even.

    At y · 2^22 floats lie half of y's power of two apart, which is E2M1's step, so the difference
    of the two is rounded to it. Below 1 the step stays 0.5; the 4 keeps the difference from
    falling under 2^22, where floats lie closer.
    """
    large = y * ONE
    large = tl.where(large < ONE + 4.0, ONE + 4.0, large)
    return large - (large - y)


@triton.jit
def e4m3_nearest(x, ASM: tl.constexpr):
    """fp32 within +-448 to E4M3 bytes as uint8, ties to even; NaN to NaN."""
    if ASM:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = bits.to(tl.float32, bitcast=True) * 512.0 + NEAREST
    code = tl.where(bits < (121 << 23), small.to(tl.int32, bitcast=True) & 0xF, normal)
    code = tl.where(bits > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def e4m3_value(byte, ASM: tl.constexpr):
    """E4M3 bytes as uint8 to fp32."""
    if ASM:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    code = byte.to(tl.int32)
    exponent = (code >> 3) & 15
    normal = ((exponent + 120) << 23) | ((code & 7) << 20)
    small = (code & 7).to(tl.float32) * 0.001953125
    value = tl.where(exponent > 0, normal.to(tl.float32, bitcast=True), small)
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    return tl.where(code > 127, -value, value)
