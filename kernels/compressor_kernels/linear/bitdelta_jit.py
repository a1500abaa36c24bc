"""Triton code of `bitdelta`: activations to fixed point, then signs x activations on int8 units.

A word holds 32 signs. `word & 0x01010101 << s` is four int8 operands {0, 2^s} at once: one
instruction for four signs, and no shift, because each bit position s has an accumulator of its
own whose factor 2^s is divided out at the end. The other operand is the activation in fixed point,
24 bits as three int8 digits in three columns of the product, so that nothing of fp16 or bf16 is
lost; sum of +-x = 2 * (sum of x over set bits) - (sum of x).

Planes layout: int8 [B, M/MB, KB, 8 (s), 4*MB (digit, token), 128 (word, byte)], where one KB is
32 words = 1024 inputs, and input 32*word + 8*byte + s stands at (s, 4*word + byte). The fourth
digit is zero: a power of two is needed.
"""

import triton
import triton.language as tl

from compressor_kernels.triton.registers_jit import bytes_of

BLOCK = tl.constexpr(1024)
# |x| of a row's largest input in fixed point: three balanced base-256 digits reach 127.5 * 2^16.
FULL_SCALE = tl.constexpr(4194304.0)


@triton.jit
def planes_kernel(
    x_ptr,
    planes_ptr,
    scale_ptr,
    sum_ptr,
    M,
    stride_b,
    stride_m,
    K: tl.constexpr,
    KB: tl.constexpr,
    MB: tl.constexpr,
    ROW: tl.constexpr,
):
    """One program: one token's KB-th block of digits. Scale and sum [B, M] come from KB 0."""
    kb = tl.program_id(0)
    m = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = x_ptr + b * stride_b + m.to(tl.int64) * stride_m
    inputs = tl.where(m < M, K, 0)  # none in the tokens that only fill a tile
    biggest = tl.zeros((ROW,), tl.float32)
    total = tl.zeros((ROW,), tl.float32)
    for start in tl.static_range(0, K, ROW):
        k = start + tl.arange(0, ROW)
        x = tl.load(row + k, mask=k < inputs, other=0.0).to(tl.float32)
        biggest = tl.maximum(biggest, tl.abs(x))
        total += x
    top = tl.max(biggest, 0)
    # The sum also carries a row's NaN or infinity into every output of that row.
    if kb == 0:  # noqa: SIM102 - tensors have no `and`
        if m < M:
            tl.store(scale_ptr + b * M + m, top / FULL_SCALE)
            tl.store(sum_ptr + b * M + m, tl.sum(total, 0))
    s = tl.arange(0, 8)
    j = tl.arange(0, 128)
    k = kb * BLOCK + j[None, :] * 8 + s[:, None]
    x = tl.load(row + k, mask=k < inputs, other=0.0).to(tl.float32)
    factor = FULL_SCALE / tl.maximum(top, 1e-30)
    q = tl.floor(x * factor + 0.5).to(tl.int32)
    blocks = tl.num_programs(1) // MB
    tile = (b * blocks + m // MB) * KB + kb
    out = planes_ptr + tile * (8 * 4 * MB * 128) + s[:, None] * (4 * MB * 128) + j[None, :]
    out += (m % MB) * 128
    for digit in tl.static_range(4):
        low = ((q + 128) & 255) - 128
        tl.store(out + digit * MB * 128, low.to(tl.int8))
        q = (q - low) >> 8


@triton.jit
def delta_kernel(
    planes_ptr,
    scale_ptr,
    sum_ptr,
    signs_ptr,
    alpha_ptr,
    base_ptr,
    y_ptr,
    M,
    N: tl.constexpr,
    WORDS: tl.constexpr,
    KB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MB: tl.constexpr,
    APART: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BLOCK_N outputs of MB tokens of one tenant. Base and y are [B, M, N], dense.

    APART keeps an accumulator for each bit position; without it the words are shifted instead,
    which costs one more instruction for four signs and an eighth of the registers.
    """
    COLS: tl.constexpr = 4 * MB
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mb = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    live = n < N
    word = tl.arange(0, 32)
    signs_ptr += b * (WORDS * N) + n[:, None]
    tile = (b * tl.num_programs(1) + mb) * (KB * 8 * COLS * 128)
    column = tl.arange(0, COLS)
    planes_ptr += tile + column[None, :] * 128 + tl.arange(0, 128)[:, None]
    zero = tl.zeros((BLOCK_N, COLS), tl.int32)
    acc = (zero, zero, zero, zero, zero, zero, zero, zero)
    one = zero
    for kb in tl.range(0, KB):
        w = kb * 32 + word
        words = tl.load(
            signs_ptr + w[None, :] * N, mask=live[:, None] & (w[None, :] < WORDS), other=0
        )
        grown = ()
        for s in tl.static_range(8):
            plane = tl.load(planes_ptr + (kb * 8 + s) * (COLS * 128))
            if APART:
                # int32 has no 0x80808080 but as a negative number
                one_bit = words & ((0x01010101 << s) if s < 7 else -0x7F7F7F80)
                picked = bytes_of(one_bit, BLOCK_N, 32, ASM)
                grown = grown + (tl.dot(picked, plane, acc[s], out_dtype=tl.int32),)  # noqa: RUF005
            else:
                picked = bytes_of((words >> s) & 0x01010101, BLOCK_N, 32, ASM)
                one = tl.dot(picked, plane, one, out_dtype=tl.int32)
        if APART:
            acc = grown
    if APART:
        digits = acc[7].to(tl.float32) * (-1.0 / 128)  # bit 7 of an int8 weighs -128
        for s in tl.static_range(7):
            digits += acc[s].to(tl.float32) * (1.0 / (1 << s))
    else:
        digits = one.to(tl.float32)
    place = column // MB
    weight = tl.where(place == 0, 1.0, tl.where(place == 1, 256.0, 65536.0))
    picked_sum = tl.sum(tl.reshape(digits * weight[None, :], (BLOCK_N, 4, MB)), 1)
    m = mb * MB + tl.arange(0, MB)
    token = b * M + m
    fits = m < M
    scale = tl.load(scale_ptr + token, mask=fits, other=0.0)
    total = tl.load(sum_ptr + token, mask=fits, other=0.0)
    y = tl.load(alpha_ptr + b) * (2.0 * scale[None, :] * picked_sum - total[None, :])
    at = token[None, :] * N + n[:, None]
    inside = live[:, None] & fits[None, :]
    if HAS_BASE:
        y += tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
