"""Triton code of `weight_only`: codes of any width decoded in registers, summed in fp32."""

import triton
import triton.language as tl

from compressor_kernels.triton.rounding_jit import e4m3_value


@triton.jit
def _stream(ptr, place, step, inside, BITS: tl.constexpr):
    """Codes at `place` of a stream of BITS bits, lowest first, whose words lie `step` apart."""
    bit = place * BITS
    word = bit // 32
    shift = (bit % 32).to(tl.uint32)
    low = tl.load(ptr + word.to(tl.int64) * step, mask=inside, other=0)
    code = low.to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:  # a code may reach into the next word
        split = inside & (shift + BITS > 32)
        high = tl.load(ptr + (word + 1).to(tl.int64) * step, mask=split, other=0)
        high = high.to(tl.uint32, bitcast=True) << tl.where(split, 32 - shift, 0)
        code = code | tl.where(split, high, 0)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def weight_only_kernel(
    x_ptr,  # fp16 or bf16 [M, I]
    codes_ptr,  # int32 [O, WORDS], or E4M3 bytes [O, I]
    scales_ptr,  # [ceil(O/ROWS), GROUPS]
    zeros_ptr,  # int32 [ceil(O*BITS/32), GROUPS], or int32 [1] if ONE_ZERO, or None
    bias_ptr,  # [O] or None
    out_ptr,  # [M, O]
    M,
    O,
    I: tl.constexpr,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,  # 0: E4M3
    ROWS: tl.constexpr,  # outputs and inputs that share a scale
    COLS: tl.constexpr,
    GROUPS: tl.constexpr,
    ONE_ZERO: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BM tokens by BN outputs."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = n.to(tl.int64)[:, None]
    sums = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, I, BK):
        k = start + tl.arange(0, BK)
        x_at = x_ptr + m.to(tl.int64)[:, None] * I + k[None, :]
        x = tl.load(x_at, mask=(m < M)[:, None] & (k < I)[None, :], other=0.0)
        inside = (n < O)[:, None] & (k < I)[None, :]
        group = k[None, :] // COLS
        if BITS == 0:
            code = tl.load(codes_ptr + row * I + k[None, :], mask=inside, other=0)
            value = e4m3_value(code, ASM)
        else:
            code = _stream(codes_ptr + row * WORDS, k[None, :], 1, inside, BITS)
            zero = tl.full((1, 1), 1 << (BITS - 1), tl.int32)
            if zeros_ptr is not None:
                if ONE_ZERO:
                    zero = tl.load(zeros_ptr)
                else:
                    zero = _stream(zeros_ptr + group, n[:, None], GROUPS, inside, BITS)
            value = (code - zero).to(tl.float32)
        if COLS < I:  # else the sum is scaled
            scale = tl.load(scales_ptr + row // ROWS * GROUPS + group, mask=inside, other=0.0)
            value = value * scale.to(tl.float32)
        value = tl.where(inside, value, 0.0)
        if ASM:
            sums = tl.dot(x, value.to(dtype).T, sums)
        else:
            sums += tl.dot(x.to(tl.float32), value.to(dtype).to(tl.float32).T)
    if COLS >= I:
        scale = tl.load(scales_ptr + n // ROWS, mask=n < O, other=0.0).to(tl.float32)
        sums *= scale[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * O + n[None, :]
    tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < O)[None, :])
