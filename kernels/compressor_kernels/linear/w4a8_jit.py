"""Triton code of `w4a8`: QServe's tiles to tensor-core operands without moving a nibble.

A tile of 32 outputs by 32 inputs is 128 words in the order [c, e, d, b]: the low halves of the
four bytes of a word are inputs 16d + 4e … + 3 of output 8b + c, the high halves those of output
16 + 8b + c. That is how the operand of an int8 product lies over the lanes of a warp: c and e are
the lane, d and b its four registers. The words are loaded as one dimension and given their two by
reshaping, so that the compiler finds one 16-byte load for each lane; masking the halves of a word
makes two operands.

A group's part of a product is exact in int32. Its level-2 scale and zero point meet it there:
Σ (q · s2 + z2) x = s2 · Σ q x + z2 · Σ x.
"""

import triton
import triton.language as tl

from compressor_kernels.triton.registers_jit import bytes_of


@triton.jit
def _operands(words, KS: tl.constexpr, OT: tl.constexpr, IT: tl.constexpr, ASM: tl.constexpr):
    """int32 [KS, OT, IT * 128] to two of int8 [KS, OT * 16, IT * 32]: low and high halves."""
    words = tl.reshape(words, (KS, OT, IT, 8, 4, 2, 2))  # ks, ot, it, c, e, d, b
    words = tl.reshape(tl.permute(words, (0, 1, 6, 3, 2, 5, 4)), (KS, OT * 16, IT * 8))
    low = words & 0x0F0F0F0F
    high = (words >> 4) & 0x0F0F0F0F
    return _bytes(low, KS, OT * 16, IT * 8, ASM), _bytes(high, KS, OT * 16, IT * 8, ASM)


@triton.jit
def _bytes(words, KS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ASM: tl.constexpr):
    """int32 [KS, ROWS, COLS] to int8 [KS, ROWS, 4 * COLS], fp32 in the interpreter."""
    flat = tl.reshape(words, (KS * ROWS, COLS))
    if ASM:
        wide = tl.broadcast_to(words[:, :, :, None], (KS, ROWS, COLS, 4))
        wide = tl.reshape(wide, (KS, ROWS, 4 * COLS))
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [wide], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return tl.reshape(bytes_of(flat, KS * ROWS, COLS, False), (KS, ROWS, 4 * COLS)).to(
            tl.float32
        )


@triton.jit
def _level2(words, KS: tl.constexpr, OT: tl.constexpr):
    """int32 [KS, OT, 4], bytes of level 2 as stored, to fp32 [KS, OT * 16, 1].

    Byte 2 l + h of the 16 that belong to the low halves, or to the high ones, is output 8 h + l.
    Words, because a byte for each thread is too narrow for an asynchronous copy.
    """
    shape: tl.constexpr = (KS, OT, 2, 4, 2)  # ks, ot, h, l / 2, l % 2
    h = tl.arange(0, 2)[None, None, :, None, None]
    l = tl.arange(0, 2)[None, None, None, None, :]
    words = tl.broadcast_to(words[:, :, None, :, None], shape)
    values = (words << tl.broadcast_to(24 - (l * 2 + h) * 8, shape)) >> 24
    return tl.reshape(values.to(tl.float32), (KS, OT * 16))[:, :, None]


@triton.jit
def decode_kernel(
    a_ptr,  # int8 [M, I]
    words_ptr,  # int32 [O / 32, I / 32, 128]
    s1_ptr,  # [O]
    s2_ptr,  # int8 as int32 [I / G, O / 4], or None for one scale per channel
    zeros_ptr,  # the same, or z1 [O]
    row_scales_ptr,  # fp32 [M] or [1]
    bias_ptr,  # [O] or None
    out_ptr,  # [M, O], or fp32 [SPLIT, M, O] partial sums
    M,
    O,
    I: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,  # inputs of a slice
    ROWS: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    KS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BN outputs of MB tokens over every input, or over 1/SPLIT of them.

    A step takes KS slices of S inputs side by side, each slice by one warp. The slices' sums meet
    at the end. Outputs are held in two halves: those in the low and in the high halves of bytes.
    """
    OT: tl.constexpr = BN // 32
    IT: tl.constexpr = S // 32
    STEPS: tl.constexpr = (I + KS * S * SPLIT - 1) // (KS * S * SPLIT)
    EVEN: tl.constexpr = I % (KS * S * SPLIT) == 0
    GROUPED: tl.constexpr = s2_ptr is not None
    PER_GROUP: tl.constexpr = G // S if GROUPED else 1  # slices of a group
    kind: tl.constexpr = tl.int32 if ASM else tl.float32
    token = tl.program_id(0) * MB
    first = tl.program_id(1) * BN
    part = tl.program_id(2)

    tile = tl.minimum(tl.arange(0, OT), O // 32 - 1 - first // 32)[None, :, None]
    m = tl.arange(0, MB)
    slices = part * (STEPS * KS) + tl.arange(0, KS)[:, None, None]
    word = slices * (IT * 128) + tl.arange(0, IT * 128)[None, None, :]
    k = slices * S + tl.arange(0, S)[None, None, :]
    words_ptrs = words_ptr + (first // 32 + tile).to(tl.int64) * (I * 4) + word
    live = (token + m < M)[None, :, None]
    a_ptrs = a_ptr + (token + m).to(tl.int64)[None, :, None] * I + k
    n = tl.arange(0, OT * 16) // 16 * 32 + tl.arange(0, OT * 16) % 16  # those in low halves
    low_at = tl.minimum(first + n, O - 1)
    high_at = tl.minimum(first + n + 16, O - 1)
    level2 = (first // 32 + tile) * 8 + tl.arange(0, 4)[None, None, :]
    ones = tl.full((KS, 16, S), 1, tl.int8 if ASM else tl.float32)

    low = tl.zeros((KS, OT * 16, MB), tl.float32)
    high = tl.zeros((KS, OT * 16, MB), tl.float32)
    sums = tl.zeros((KS, 1, MB), tl.float32)
    none = tl.zeros((KS, OT * 16, MB), kind)
    nothing = tl.zeros((KS, 16, MB), kind)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        if EVEN:
            words = tl.load(words_ptrs)
            a = tl.load(a_ptrs, mask=live, other=0)
        else:
            left = I - step * (KS * S)
            words = tl.load(words_ptrs, mask=word < left * 4, other=0)
            a = tl.load(a_ptrs, mask=live & (k < left), other=0)
        if GROUPED:
            group = (slices + step * KS) // PER_GROUP
            inside = group < I // G
            at = group * (O // 4) + level2
            s2_low = tl.load(s2_ptr + at, mask=inside, other=0)
            s2_high = tl.load(s2_ptr + at + 4, mask=inside, other=0)
            z2_low = tl.load(zeros_ptr + at, mask=inside, other=0)
            z2_high = tl.load(zeros_ptr + at + 4, mask=inside, other=0)
        q_low, q_high = _operands(words, KS, OT, IT, ASM)
        a = tl.trans(a if ASM else a.to(tl.float32), (0, 2, 1))
        inputs = tl.max(tl.dot(ones, a, nothing, out_dtype=kind), 1)[:, None, :].to(tl.float32)
        part_low = tl.dot(q_low, a, none, out_dtype=kind).to(tl.float32)
        part_high = tl.dot(q_high, a, none, out_dtype=kind).to(tl.float32)
        if GROUPED:
            low += part_low * _level2(s2_low, KS, OT) + _level2(z2_low, KS, OT) * inputs
            high += part_high * _level2(s2_high, KS, OT) + _level2(z2_high, KS, OT) * inputs
        else:
            low += part_low
            high += part_high
            sums += inputs
        words_ptrs += KS * IT * 128
        a_ptrs += KS * S

    m = token + m
    live = m < M
    if ROWS:
        by = tl.load(row_scales_ptr + m, mask=live, other=0.0)[None, :]
    else:
        by = tl.load(row_scales_ptr)
    out_ptr += part.to(tl.int64) * M * O
    total = tl.sum(sums, 0)
    _finish(low, total, first + n, low_at, m, live, s1_ptr, zeros_ptr, bias_ptr, by, out_ptr, O,
            GROUPED, SPLIT)  # fmt: skip
    _finish(high, total, first + n + 16, high_at, m, live, s1_ptr, zeros_ptr, bias_ptr, by, out_ptr,
            O, GROUPED, SPLIT)  # fmt: skip


@triton.jit
def _finish(
    parts,  # [KS, rows, MB]
    inputs,  # [1, MB]
    n,
    at,
    m,
    live,
    s1_ptr,
    zeros_ptr,
    bias_ptr,
    by,
    out_ptr,
    O,
    GROUPED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    y = tl.sum(parts, 0) * tl.load(s1_ptr + at).to(tl.float32)[:, None]
    if not GROUPED:
        y -= tl.load(zeros_ptr + at).to(tl.float32)[:, None] * inputs
    y = y * by
    if bias_ptr is not None and SPLIT == 1:
        y += tl.load(bias_ptr + at).to(tl.float32)[:, None]
    where = m.to(tl.int64)[None, :] * O + n[:, None]
    tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=(n < O)[:, None] & live[None, :])


@triton.jit
def sums_kernel(
    a_ptr,
    sums_ptr,
    M,
    I: tl.constexpr,
    S: tl.constexpr,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,  # SLICES or the next power of two
):
    """Sums of int8 [M, I] over slices of S inputs: int32 [SLICES, M]. One program: one token."""
    m = tl.program_id(0).to(tl.int64)
    slice = tl.arange(0, WIDTH)
    k = slice[:, None] * S + tl.arange(0, S)[None, :]
    a = tl.load(a_ptr + m * I + k, mask=k < I, other=0).to(tl.int32)
    tl.store(sums_ptr + slice * M + m, tl.sum(a, 1), mask=slice < SLICES)


@triton.jit
def tiled_kernel(
    a_ptr,
    sums_ptr,  # int32 [SLICES, M]
    words_ptr,
    s1_ptr,
    s2_ptr,
    zeros_ptr,
    row_scales_ptr,
    bias_ptr,
    out_ptr,
    M,
    O,
    I: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BN outputs of MB tokens, one slice of inputs a step, for many tokens."""
    OT: tl.constexpr = BN // 32
    IT: tl.constexpr = S // 32
    STEPS: tl.constexpr = (I + S - 1) // S
    GROUPED: tl.constexpr = s2_ptr is not None
    PER_GROUP: tl.constexpr = G // S if GROUPED else 1
    kind: tl.constexpr = tl.int32 if ASM else tl.float32
    down = tl.cdiv(M, MB)
    token = tl.program_id(0) % down * MB
    first = tl.program_id(0) // down * BN

    tile = tl.minimum(tl.arange(0, OT), O // 32 - 1 - first // 32)[:, None]
    word = tl.arange(0, IT * 128)[None, :]
    words_ptrs = words_ptr + (first // 32 + tile).to(tl.int64) * (I * 4) + word
    m = token + tl.arange(0, MB)
    live = m < M
    k = tl.arange(0, S)[:, None]
    a_ptrs = a_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * I + k
    n = tl.arange(0, OT * 16) // 16 * 32 + tl.arange(0, OT * 16) % 16
    low_at = tl.minimum(first + n, O - 1)
    high_at = tl.minimum(first + n + 16, O - 1)
    level2 = (first // 32 + tile) * 8 + tl.arange(0, 4)[None, :]
    low = tl.zeros((OT * 16, MB), tl.float32)
    high = tl.zeros((OT * 16, MB), tl.float32)
    none = tl.zeros((OT * 16, MB), kind)
    sums = tl.zeros((MB,), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        if I % S == 0:
            words = tl.load(words_ptrs)
            a = tl.load(a_ptrs)
        else:
            left = I - step * S
            words = tl.load(words_ptrs, mask=word < left * 4, other=0)
            a = tl.load(a_ptrs, mask=k < left, other=0)
        inputs = tl.load(sums_ptr + step * M + m, mask=live, other=0).to(tl.float32)
        q_low, q_high = _operands(words[None, :, :], 1, OT, IT, ASM)
        q_low = tl.reshape(q_low, (OT * 16, S))
        q_high = tl.reshape(q_high, (OT * 16, S))
        a = a if ASM else a.to(tl.float32)
        part_low = tl.dot(q_low, a, none, out_dtype=kind).to(tl.float32)
        part_high = tl.dot(q_high, a, none, out_dtype=kind).to(tl.float32)
        if GROUPED:
            at = step // PER_GROUP * (O // 4) + level2
            s2_low = _level2(tl.load(s2_ptr + at)[None, :, :], 1, OT)
            s2_high = _level2(tl.load(s2_ptr + at + 4)[None, :, :], 1, OT)
            z2_low = _level2(tl.load(zeros_ptr + at)[None, :, :], 1, OT)
            z2_high = _level2(tl.load(zeros_ptr + at + 4)[None, :, :], 1, OT)
            low += part_low * tl.reshape(s2_low, (OT * 16, 1))
            low += tl.reshape(z2_low, (OT * 16, 1)) * inputs[None, :]
            high += part_high * tl.reshape(s2_high, (OT * 16, 1))
            high += tl.reshape(z2_high, (OT * 16, 1)) * inputs[None, :]
        else:
            low += part_low
            high += part_high
            sums += inputs
        words_ptrs += IT * 128
        a_ptrs += S
    if ROWS:
        by = tl.load(row_scales_ptr + m, mask=live, other=0.0)[None, :]
    else:
        by = tl.load(row_scales_ptr)
    total = sums[None, :]
    _finish(low[None, :, :], total, first + n, low_at, m, live, s1_ptr, zeros_ptr, bias_ptr, by,
            out_ptr, O, GROUPED, 1)  # fmt: skip
    _finish(high[None, :, :], total, first + n + 16, high_at, m, live, s1_ptr, zeros_ptr, bias_ptr,
            by, out_ptr, O, GROUPED, 1)  # fmt: skip
