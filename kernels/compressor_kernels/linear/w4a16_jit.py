"""Triton code of `w4a16`: int4 weights to tensor-core operands without moving a nibble.

A packed word holds eight inputs of one output. The product over inputs is cut by the place of the
nibble, not by position: sum over p = 0..7 of W_p x_p, where W_p holds nibble p of every word and
x_p every eighth input from p on. So each lane turns the words that it holds into operands by
itself. W stands on the left of the product: tokens then need no padding to 64 or 128, only to 8.

The compiler moves the words' layout from the product back to their load only if all that enters
the unpacking is loaded or constant. Zero points of a whole slice therefore stay out of it: the
product is with u in fp16, with u - 8 in bf16, and what is missing, times the slice's sum of inputs,
comes on top.

NVFP4 weights run on the same kernels: their words are laid out alike, a group is 16 inputs, and
`second_ptr`, the global scale, says that codes are E2M1 and scales E4M3.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compressor_kernels.triton.e2m1_jit import code_scales, left_over, unpack_e2m1
from compressor_kernels.triton.nibbles_jit import (
    biased_eight,
    biased_zeros,
    unpack,
    unpack_fixed,
    zeros_of_slices,
)


@triton.jit
def _every_eighth(x, KS: tl.constexpr, N: tl.constexpr):
    """[KS, N, 128] to eight tensors [KS, 16, N], the p-th of inputs p, 8 + p, 16 + p ..."""
    low, high = tl.split(tl.reshape(x, (KS, N, 16, 2, 2, 2)))
    x04, x26 = tl.split(low)  # the last axis is bit 0 of the place, then bit 1, then bit 2
    x15, x37 = tl.split(high)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    places = (x0, x1, x2, x3, x4, x5, x6, x7)
    turned = ()
    for p in tl.static_range(8):
        turned = turned + (tl.trans(places[p], (0, 2, 1)),)  # noqa: RUF005
    return turned


@triton.jit
def _per_word(values, KS: tl.constexpr, BN: tl.constexpr, SG: tl.constexpr):
    """[KS, BN, SG], one for each group of a slice, to [KS, BN, 16], one for each word."""
    wide = tl.broadcast_to(values[:, :, :, None], (KS, BN, SG, 16 // SG))
    return tl.reshape(wide, (KS, BN, 16))


@triton.jit
def decode_kernel(
    x_ptr,  # [M, I]
    words_ptr,  # [O, ceil(I/8)]
    scales_ptr,  # [O, GROUPS]
    zeros_ptr,  # [ceil(O/8), GROUPS]
    second_ptr,  # fp32 [1], or None for int4
    bias_ptr,  # [O]
    out_ptr,  # [M, O], or fp32 [SPLIT, M, O] partial sums
    M,
    O,
    I: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    KS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    APART: tl.constexpr,
    AT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BN outputs of MB tokens over every input, or over 1/SPLIT of them.

    A step takes KS slices of 128 inputs side by side, each slice by one warp: a batched product
    [KS, BN, 16 words] x [KS, 16, MB] for each nibble place. A row's step is contiguous in memory;
    the slices' sums meet at the end. APART adds zero points of whole slices after the last step,
    which reads the inputs once more, AT slices at once, and takes them out of every step.

    EARLY: the kernel before may still run, and the one after may start once all programs are past
    their last step; any sooner, its programs would crowd on the processors that have room.
    """
    N: tl.constexpr = 8 if MB < 8 else MB
    WORDS: tl.constexpr = (I + 7) // 8
    SG: tl.constexpr = 128 // G if G < 128 else 1  # groups of a slice
    GS: tl.constexpr = G // 128 if G > 128 else 1  # slices of a group
    STEPS: tl.constexpr = (I + KS * 128 * SPLIT - 1) // (KS * 128 * SPLIT)
    SLICES: tl.constexpr = (I + 128 - 1) // 128
    EVEN: tl.constexpr = I % (KS * 128 * SPLIT) == 0
    FP4: tl.constexpr = second_ptr is not None
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    FIXED: tl.constexpr = dtype == tl.float16 and SG == 1 and not FP4
    LEVEL: tl.constexpr = 0 if FIXED else 8
    UNIT: tl.constexpr = 2.0**-24 if FIXED else 1.0
    token = tl.program_id(0) * MB
    first = tl.program_id(1).to(tl.int64) * BN
    part = tl.program_id(2)

    # Rows past the last read the last again, and are not stored.
    row = tl.minimum(tl.arange(0, BN), O - 1 - first).to(tl.int32)[None, :, None]
    m = tl.arange(0, MB)
    fits = (token + m < M)[None, :, None]
    slices = part * (STEPS * KS) + tl.arange(0, KS)[:, None, None]
    word = slices * 16 + tl.arange(0, 16)[None, None, :]
    k = slices * 128 + tl.arange(0, 128)[None, None, :]
    words_ptrs = words_ptr + first * WORDS + row * WORDS + word
    x_ptrs = x_ptr + token.to(tl.int64) * I + m[None, :, None] * I + k
    g = tl.arange(0, SG)[None, None, :]
    group = slices // GS * SG + g
    scales_ptrs = scales_ptr + first * GROUPS + row * GROUPS
    zeros_ptrs = zeros_ptr + (first // 8) * GROUPS + (first % 8 + row) // 8 * GROUPS
    nibble = (first + row) % 8 * 4
    if EARLY:
        gdc_wait()
    if SG == 1:
        scales = tl.load(scales_ptrs + group, mask=group < GROUPS, other=0.0)
    eight = biased_eight((KS, BN, 16), dtype, ASM)
    ones = tl.full((KS, BN, 16), 1.0, dtype if ASM else tl.float32)
    total = tl.zeros((KS, BN, N), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        if EVEN:
            words = tl.load(words_ptrs)
            x = tl.load(x_ptrs, mask=fits, other=0.0)
        elif I % 128 == 0:  # one mask for each slice leaves wide copies
            inside = slices < SLICES - step * KS
            words = tl.load(words_ptrs, mask=inside, other=0)
            x = tl.load(x_ptrs, mask=fits & inside, other=0.0)
        else:
            left = I - step * (KS * 128)
            words = tl.load(words_ptrs, mask=word < (left + 7) // 8, other=0)
            x = tl.load(x_ptrs, mask=fits & (k < left), other=0.0)
        group = (slices + step * KS) // GS * SG + g
        if HAS_ZEROS and not APART:
            if EVEN:
                octets = tl.load(zeros_ptrs + group)
            else:
                octets = tl.load(zeros_ptrs + group, mask=group < GROUPS, other=0)
            zeros = (octets >> nibble).to(tl.int32) & 15
        if not ASM:
            x = x.to(tl.float32)
        if MB < 8:  # a product has at least eight columns: repeat the tokens
            x = tl.broadcast_to(x[:, None, :, :], (KS, 8 // MB, MB, 128))
            x = tl.reshape(x, (KS, 8, 128))
        places = _every_eighth(x, KS, N)
        if SG > 1:
            scales = tl.load(scales_ptrs + group, mask=group < GROUPS, other=0)
            if FP4:
                wide = _per_word(code_scales(scales, dtype, ASM), KS, BN, SG)
                q = unpack_e2m1(words, wide, dtype, ASM)
            else:
                biased = _per_word(biased_zeros(zeros, dtype), KS, BN, SG) if HAS_ZEROS else eight
                q = unpack(words, biased, _per_word(scales, KS, BN, SG), dtype, True, ASM)
            for p in tl.static_range(8):
                total = tl.dot(q[p], places[p], total)
        else:
            sums = tl.zeros((KS, BN, N), tl.float32)
            if FIXED:
                q = unpack_fixed(words, ASM)
                odd = tl.zeros((KS, BN, N), tl.float32)
                for p in tl.static_range(4):
                    sums = tl.dot(q[2 * p], places[2 * p], sums)
                    odd = tl.dot(q[2 * p + 1], places[2 * p + 1], odd)
                sums += odd * 0.0625
            else:
                q = unpack(words, eight, eight, dtype, False, ASM)
                for p in tl.static_range(8):
                    sums = tl.dot(q[p], places[p], sums)
            if (HAS_ZEROS or FIXED) and not APART:
                inputs = tl.zeros((KS, BN, N), tl.float32)  # a row computes what all others do
                for p in tl.static_range(8):
                    inputs = tl.dot(ones, places[p], inputs)
                if HAS_ZEROS:
                    sums += ((LEVEL - zeros).to(tl.float32) * UNIT) * inputs
                else:
                    sums += ((LEVEL - 8) * UNIT) * inputs
            total += sums * (scales.to(tl.float32) * (1.0 / UNIT))
            # One value is too narrow for an asynchronous copy: loaded a step ahead.
            group = (slices + (step + 1) * KS) // GS
            scales = tl.load(scales_ptrs + group, mask=group < GROUPS, other=0.0)
        words_ptrs += KS * 16
        x_ptrs += KS * 128
    if EARLY:
        gdc_launch_dependents()
    y = tl.sum(total, 0)
    if FP4:
        y *= tl.load(second_ptr) * left_over(dtype)
    if APART:
        y += zeros_of_slices(
            x_ptr + token.to(tl.int64) * I,
            scales_ptr + first * GROUPS,
            zeros_ptr,
            first,
            part * (STEPS * KS),
            M - token,
            O,
            I,
            GS,
            GROUPS,
            MB,
            BN,
            N,
            STEPS * KS,
            HAS_ZEROS,
            LEVEL,
            AT,
        )
    column = tl.arange(0, N)
    m = token + column
    n = first + tl.arange(0, BN)
    if HAS_BIAS and SPLIT == 1:
        y += tl.load(bias_ptr + n, mask=n < O, other=0.0).to(tl.float32)[:, None]
    inside = (n < O)[:, None] & ((column < MB) & (m < M))[None, :]
    out_ptr += part.to(tl.int64) * M * O
    at = m.to(tl.int64)[None, :] * O + n[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def places_kernel(x_ptr, places_ptr, sums_ptr, M, I: tl.constexpr, SLICES: tl.constexpr):
    """x [M, I] by place: [M, SLICES, 8, 16], and its sums fp32 [SLICES, M]; zeros past I.

    One program: eight slices of one token.
    """
    m = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * 8 + tl.arange(0, 8)
    k = at[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + m * I + k, mask=k < I, other=0.0)
    tl.store(sums_ptr + at * M + m, tl.sum(x.to(tl.float32), 1), mask=at < SLICES)
    x = tl.reshape(tl.trans(tl.reshape(x, (8, 16, 8)), (0, 2, 1)), (8, 128))
    tl.store(places_ptr + m * (SLICES * 128) + k, x, mask=k < SLICES * 128)


@triton.jit
def tiled_kernel(
    places_ptr,  # [M, SLICES, 8, 16]
    sums_ptr,  # fp32 [SLICES, M]
    words_ptr,  # [O, ceil(I/8)]
    scales_ptr,  # [O, GROUPS]
    zeros_ptr,  # [ceil(O/8), GROUPS]
    second_ptr,  # fp32 [1], or None for int4
    bias_ptr,  # [O]
    out_ptr,  # [M, O], or fp32 [SPLIT, M, O] partial sums
    M,
    O,
    I: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BN outputs of MB tokens, one slice of 128 inputs a step, for many tokens."""
    WORDS: tl.constexpr = (I + 7) // 8
    SLICES: tl.constexpr = (I + 128 - 1) // 128
    STEPS: tl.constexpr = (SLICES + SPLIT - 1) // SPLIT
    SG: tl.constexpr = 128 // G if G < 128 else 1  # groups of a slice
    GS: tl.constexpr = G // 128 if G > 128 else 1  # slices of a group
    FP4: tl.constexpr = second_ptr is not None
    dtype: tl.constexpr = places_ptr.dtype.element_ty
    token = tl.program_id(0) * MB
    first = tl.program_id(1).to(tl.int64) * BN
    start = tl.program_id(2) * STEPS

    # Rows and tokens past the last read the last again, and are not stored.
    row = tl.minimum(tl.arange(0, BN), O - 1 - first).to(tl.int32)[:, None]
    m = tl.minimum(token + tl.arange(0, MB), M - 1)[None, :]
    fits = (token + tl.arange(0, MB) < M)[None, :]
    sums_ptrs = sums_ptr + token + tl.arange(0, MB)[None, :]
    word = start * 16 + tl.arange(0, 16)
    words_ptrs = words_ptr + first * WORDS + row * WORDS + word[None, :]
    places_ptrs = places_ptr + m.to(tl.int64) * (SLICES * 128) + start * 128
    places_ptrs += tl.arange(0, 16)[:, None]
    g = tl.arange(0, SG)[None, :]
    scales_ptrs = scales_ptr + first * GROUPS + row * GROUPS
    zeros_ptrs = zeros_ptr + (first // 8) * GROUPS + (first % 8 + row) // 8 * GROUPS
    nibble = (first + row) % 8 * 4
    eight = biased_eight((BN, 16), dtype, ASM)
    group = start // GS * SG + g
    if SG == 1:
        scales = tl.load(scales_ptrs + group, mask=group < GROUPS, other=0.0)
    total = tl.zeros((BN, MB), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        if I % (128 * SPLIT) == 0:
            words = tl.load(words_ptrs)
        elif I % 128 == 0:
            inside = tl.full((1, 16), start + step, tl.int32) < SLICES
            words = tl.load(words_ptrs, mask=inside, other=0)
        else:
            words = tl.load(words_ptrs, mask=(word + step * 16 < WORDS)[None, :], other=0)
        inside = tl.full((1, MB), start + step, tl.int32) < SLICES
        group = (start + step) // GS * SG + g
        if HAS_ZEROS:
            octets = tl.load(zeros_ptrs + group, mask=group < GROUPS, other=0)
            zeros = (octets >> nibble).to(tl.int32) & 15
        if SG > 1:
            scales = tl.load(scales_ptrs + group, mask=group < GROUPS, other=0)
            if FP4:
                scales = code_scales(scales, dtype, ASM)
            wide = tl.reshape(_per_word(scales[None, :, :], 1, BN, SG), (BN, 16))
            if FP4:
                q = unpack_e2m1(words, wide, dtype, ASM)
            else:
                biased = eight
                if HAS_ZEROS:
                    biased = _per_word(biased_zeros(zeros, dtype)[None, :, :], 1, BN, SG)
                    biased = tl.reshape(biased, (BN, 16))
                q = unpack(words, biased, wide, dtype, True, ASM)
            sums = total
        else:
            q = unpack(words, eight, eight, dtype, False, ASM)
            sums = tl.zeros((BN, MB), tl.float32)
        for p in tl.static_range(8):
            x = tl.load(places_ptrs + p * 16, mask=inside, other=0.0)
            sums = tl.dot(q[p], x if ASM else x.to(tl.float32), sums)
        if SG > 1:
            total = sums
        else:
            if HAS_ZEROS:
                inputs = tl.load(sums_ptrs + (start + step) * M, mask=fits & inside, other=0.0)
                sums += (8 - zeros).to(tl.float32) * inputs
            total += sums * scales.to(tl.float32)
            # One value is too narrow for an asynchronous copy: loaded a step ahead.
            group = (start + step + 1) // GS + g
            scales = tl.load(scales_ptrs + group, mask=group < GROUPS, other=0.0)
        words_ptrs += 16
        places_ptrs += 128
    if FP4:
        total *= tl.load(second_ptr) * left_over(dtype)
    m = (token + tl.arange(0, MB)).to(tl.int64)[None, :]
    n = first + tl.arange(0, BN)
    if HAS_BIAS and SPLIT == 1:
        total += tl.load(bias_ptr + n, mask=n < O, other=0.0).to(tl.float32)[:, None]
    out_ptr += tl.program_id(2).to(tl.int64) * M * O
    y = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m * O + n[:, None], y, mask=(n < O)[:, None] & fits)


@triton.jit
def dequantize_kernel(
    words_ptr,  # [O, ceil(I/8)]
    scales_ptr,  # [O, GROUPS]
    zeros_ptr,  # [ceil(O/8), GROUPS]
    second_ptr,  # fp32 [1], or None for int4
    out_ptr,  # [O, I]
    O,
    I: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    BN: tl.constexpr,
    COLS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: COLS words of BN outputs."""
    WORDS: tl.constexpr = (I + 7) // 8
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n = (tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    word = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    inside = (n < O) & (word < WORDS)
    words = tl.load(words_ptr + n * WORDS + word, mask=inside, other=0)
    group = tl.minimum(word * 8 // G, GROUPS - 1)
    scales = tl.load(scales_ptr + n * GROUPS + group, mask=inside, other=0)
    if second_ptr is not None:
        q = unpack_e2m1(words, code_scales(scales, dtype, ASM), dtype, ASM)
    else:
        biased = biased_eight((BN, COLS), dtype, ASM)
        if HAS_ZEROS:
            octets = tl.load(zeros_ptr + n // 8 * GROUPS + group, mask=inside, other=0)
            biased = biased_zeros((octets >> (n % 8 * 4).to(tl.int32)) & 15, dtype)
        q = unpack(words, biased, scales, dtype, True, ASM)
    even = tl.join(tl.join(q[0], q[4]), tl.join(q[2], q[6]))
    odd = tl.join(tl.join(q[1], q[5]), tl.join(q[3], q[7]))
    dense = tl.reshape(tl.join(even, odd), (BN, 8 * COLS))
    if second_ptr is not None:
        dense = dense.to(tl.float32) * (tl.load(second_ptr) * left_over(dtype))
    k = tl.program_id(0) * (8 * COLS) + tl.arange(0, 8 * COLS)[None, :]
    tl.store(out_ptr + n * I + k, dense.to(dtype), mask=(n < O) & (k < I))
