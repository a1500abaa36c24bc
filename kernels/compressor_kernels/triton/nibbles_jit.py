"""Packed int4 words to fp16 or bf16 values, without a conversion.

A nibble beside the bits of 1024 in fp16, or of 128 in bf16, is that number plus the nibble, and
subtracting a zero point kept in the same way leaves an exact small integer.
"""

import triton
import triton.language as tl


def _unpack_asm(*, bf16: bool, scaled: bool) -> str:
    """PTX: words $8, $9, biased zeros $10 and scales $11 to nibbles 0..7 in $0..$7.

    Each register of $0..$7, $10 and $11 holds two values: one for each of the two words.
    """
    kind, magic, step = ("bf16x2", "0x43004300", 4) if bf16 else ("f16x2", "0x64006400", 8)
    lines = [
        ".reg .b32 half0, half1, high_zero, sixteenth;",
        "prmt.b32 half0, $8, $9, 0x5410;",  # nibbles 0..3 of both words
        "prmt.b32 half1, $8, $9, 0x7632;",  # nibbles 4..7
    ]
    if not bf16:
        lines += [
            "mov.b32 high_zero, 0x63806380;",  # 960 - (1024 + z) = -(1024 / 16 + z)
            "sub.f16x2 high_zero, high_zero, $10;",
            "mov.b32 sixteenth, 0x2c002c00;",
        ]
    for p in range(8):
        half = f"half{p // 4}"
        # fp16 has the bits to hold the odd nibble where it lies, sixteen times too large.
        in_place = p % 2 and not bf16
        if p % 4 and not in_place:
            lines.append(f"shr.u32 {half}, {half}, {step};")
        mask = "0x00f000f0" if in_place else "0x000f000f"
        lines.append(f"lop3.b32 ${p}, {half}, {mask}, {magic}, 0xea;")
        if in_place:
            lines.append(f"fma.rn.f16x2 ${p}, ${p}, sixteenth, high_zero;")
        else:
            lines.append(f"sub.{kind} ${p}, ${p}, $10;")
        if scaled:
            lines.append(f"mul.{kind} ${p}, ${p}, $11;")
    return "{" + "\n".join(lines) + "}"


def _fixed_asm() -> str:
    """PTX: words $8, $9 to nibbles 0..7 in $0..$7 where they lie in their bytes."""
    lines = [".reg .b32 octet;"]
    for byte in range(4):
        lines.append(f"prmt.b32 octet, $8, $9, 0x{4 + byte}{4 + byte}{byte}{byte};")
        lines.append(f"and.b32 ${2 * byte}, octet, 0x000f000f;")
        lines.append(f"and.b32 ${2 * byte + 1}, octet, 0x00f000f0;")
    return "{" + "\n".join(lines) + "}"


FIXED = tl.constexpr(_fixed_asm())
FP16 = tl.constexpr(_unpack_asm(bf16=False, scaled=False))
BF16 = tl.constexpr(_unpack_asm(bf16=True, scaled=False))
FP16_SCALED = tl.constexpr(_unpack_asm(bf16=False, scaled=True))
BF16_SCALED = tl.constexpr(_unpack_asm(bf16=True, scaled=True))
REGISTERS = tl.constexpr(",".join(["=&r"] * 8) + ",r,r,r,r")


@triton.jit
def biased_zeros(zeros, dtype: tl.constexpr):
    """int32 0..15 to 1024 + z in fp16 or 128 + z in bf16."""
    if dtype == tl.float16:
        return (zeros | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return (zeros | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def biased_eight(shape: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """The zero of symmetric weights, as a constant that the compiler can see through."""
    value: tl.constexpr = 1032.0 if dtype == tl.float16 else 136.0
    if ASM:
        return tl.full(shape, value, dtype)
    # Triton 3.7's interpreter has no constants of bfloat16.
    return tl.full(shape, value, tl.float32).to(dtype)


@triton.jit
def unpack(words, biased, scales, dtype: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr):
    """int32 words, biased zeros and scales of one shape to eight tensors of u - z, u nibble p.

    SCALED multiplies by `scales`. ASM=False says the same in plain fp32, for the interpreter.
    """
    if not ASM:
        plain = ()
        bias: tl.constexpr = 1024.0 if dtype == tl.float16 else 128.0
        for p in tl.static_range(8):
            q = ((words >> (4 * p)) & 15).to(tl.float32) - (biased.to(tl.float32) - bias)
            plain = plain + (q * scales.to(tl.float32) if SCALED else q,)  # noqa: RUF005
        return plain
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            FP16_SCALED if SCALED else FP16,
            REGISTERS,
            [words, biased, scales.to(tl.float16)],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            BF16_SCALED if SCALED else BF16,
            REGISTERS,
            [words, biased, scales.to(tl.bfloat16)],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )


@triton.jit
def unpack_fixed(words, ASM: tl.constexpr):
    """int32 words to eight tensors in fp16: nibble p times 2^-24, or 2^-20 where p is odd.

    A nibble among zeros is a subnormal fp16 of that value, so one mask makes an operand of it.
    Tensor cores multiply subnormals exactly.
    """
    if not ASM:
        plain = ()
        for p in tl.static_range(8):
            unit: tl.constexpr = 2.0**-20 if p % 2 else 2.0**-24
            plain = plain + (((words >> (4 * p)) & 15).to(tl.float32) * unit,)  # noqa: RUF005
        return plain
    else:
        return tl.inline_asm_elementwise(
            FIXED,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
            [words],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )


@triton.jit
def zeros_of_slices(
    x_ptr,  # [count, I]
    scales_ptr,  # [.., GROUPS], the first output's row
    zeros_ptr,  # [ceil(O/8), GROUPS]
    first,
    start,
    count,
    O,
    I: tl.constexpr,
    GS: tl.constexpr,
    GROUPS: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LEVEL: tl.constexpr,
    AT: tl.constexpr,
):
    """What zero points but LEVEL add to BN outputs, `first` the first, of MB tokens: [BN, N].

    The sum over SLICES slices of 128 inputs from `start` of (LEVEL - z) s times the slice's sum of
    inputs, AT slices at once, where GS slices make a group; z is 8 without zeros. MB columns are
    repeated up to N.
    """
    row = tl.minimum(tl.arange(0, BN), O - 1 - first)[:, None]
    m = tl.arange(0, MB)
    zeros_ptr += (first + row) // 8 * GROUPS
    nibble = ((first + row) % 8 * 4).to(tl.int32)
    total = tl.zeros((BN, MB, AT), tl.float32)
    for at in tl.range(0, SLICES, AT):
        slices = start + at + tl.arange(0, AT)
        k = slices[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
        x = tl.load(
            x_ptr + m[:, None, None] * I + k, mask=(m < count)[:, None, None] & (k < I), other=0.0
        )
        group = (slices // GS)[None, :]
        inside = (group < GROUPS) & (at + tl.arange(0, AT) < SLICES)[None, :]
        scales = tl.load(scales_ptr + row * GROUPS + group, mask=inside, other=0.0)
        if HAS_ZEROS:
            octets = tl.load(zeros_ptr + group, mask=inside, other=0)
            weights = (LEVEL - ((octets >> nibble) & 15)).to(tl.float32) * scales.to(tl.float32)
        else:
            weights = scales.to(tl.float32) * (LEVEL - 8)
        total += weights[:, None, :] * tl.sum(x.to(tl.float32), 2)[None, :, :]
    y = tl.sum(total, 2)
    if MB < N:
        y = tl.reshape(tl.broadcast_to(y[:, None, :], (BN, N // MB, MB)), (BN, N))
    return y
