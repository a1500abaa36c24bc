"""Packed E2M1 codes to fp16 or bf16 values under E4M3 scales, in registers.

The three bits below a code's sign are a small float of their own. Laid over the lowest exponent
bits and the highest mantissa bit of fp16 or bf16 they read as that number times 2^-14 or 2^-126,
subnormals included. Times a scale, which for bf16 carries 2^118 so that nothing stays subnormal,
the product has at most six bits and is exact; what is left over, 2^-14 or 2^-8, is the caller's.
"""

import triton
import triton.language as tl

from compressor_kernels.triton.rounding_jit import e4m3_value


def _unpack_asm(*, bf16: bool) -> str:
    """PTX: words $8, $9 and scales $10 to scaled codes 0..7 in $0..$7.

    Each register of $0..$7 and $10 holds two values: one for each of the two words.
    """
    kind, mask, right = ("bf16x2", "0x01c001c0", 6) if bf16 else ("f16x2", "0x0e000e00", 3)
    lines = [
        ".reg .b32 half0, half1, sign, small;",
        "prmt.b32 half0, $8, $9, 0x5410;",  # codes 0..3 of both words
        "prmt.b32 half1, $8, $9, 0x7632;",  # codes 4..7
    ]
    for p in range(8):
        half, left = f"half{p // 4}", 4 * (3 - p % 4)
        if left:
            lines.append(f"shl.b32 sign, {half}, {left};")
        turn, by = ("shr.u32", right - left) if right >= left else ("shl.b32", left - right)
        lines += [
            f"{turn} small, {half}, {by};",
            f"and.b32 small, small, {mask};",
            # (sign & 0x80008000) | small
            f"lop3.b32 ${p}, {'sign' if left else half}, 0x80008000, small, 0xea;",
            f"mul.{kind} ${p}, ${p}, $10;",
        ]
    return "{" + "\n".join(lines) + "}"


FP16 = tl.constexpr(_unpack_asm(bf16=False))
BF16 = tl.constexpr(_unpack_asm(bf16=True))
REGISTERS = tl.constexpr(",".join(["=&r"] * 8) + ",r,r,r")


@triton.jit
def left_over(dtype: tl.constexpr):
    """What scaled codes are to be multiplied with."""
    return 16384.0 if dtype == tl.float16 else 256.0


@triton.jit
def code_scales(bytes, dtype: tl.constexpr, ASM: tl.constexpr):
    """E4M3 bytes to the scales that `unpack_e2m1` takes, fp32 in the interpreter."""
    if ASM and dtype == tl.float16:
        return bytes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif ASM:
        # To fp32 first: there is no conversion from E4M3 to bf16 but by fp16 or fp32.
        scales = bytes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        return (scales * 3.3230699894622897e35).to(tl.bfloat16)  # 2^118
    else:
        return e4m3_value(bytes, False)


@triton.jit
def unpack_e2m1(words, scales, dtype: tl.constexpr, ASM: tl.constexpr):
    """int32 words and `code_scales` of one shape to eight tensors of scaled codes, less
    `left_over`."""
    if not ASM:
        plain = ()
        for p in tl.static_range(8):
            code = (words >> (4 * p)) & 15
            index = code & 7
            exponent = index >> 1
            half = tl.where(exponent > 0, (2 + (index & 1)) << exponent, (index & 1) * 2)
            value = half.to(tl.float32) * 0.25
            value = tl.where(code > 7, -value, value) * scales
            plain = plain + (value / left_over(dtype),)  # noqa: RUF005
        return plain
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            FP16, REGISTERS, [words, scales], dtype=(tl.float16,) * 8, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            BF16, REGISTERS, [words, scales], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
        )
