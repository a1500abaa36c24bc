"""Products with integers of any width or E4M3 weights and float inputs, straight from the file.

y = x W^T + bias, W[o, i] = (u[o, i] - z) * s: each scale belongs to `rows` outputs by `columns`
inputs. Tensors as compressed-tensors stores them:
  codes   weight_packed      int32 [O, ceil(I*bits/32)], a row's codes of 1 to 8 bits as one stream,
                             lowest bit first, or
          weight             float8_e4m3fn [O, I], whose values need no zero
  scales  weight_scale       fp16, bf16 or fp32 [ceil(O/rows), ceil(I/columns)]
  zeros   weight_zero_point  int32 [ceil(O*bits/32), I/columns], streams along the outputs (rows=1),
                             or int8 [1] less 2^(bits-1); None: z = 2^(bits-1)
For 4 bits in usual groups `w4a16` is many times faster; this is for all that it does not read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodedTiles:
    """Tokens, outputs and inputs of a program's step."""

    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    num_warps: int = 4


def weight_only(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int = 8,
    block: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tiles: DecodedTiles | None = None,
) -> Tensor:
    """x [..., I] in fp16 or bf16 times such weights: [..., O] in `out_dtype`, x's if not given.

    block  (rows, columns) that share a scale; None: a whole row, or all where there is one scale
    Sums are in fp32. Where a row has several scales, (u - z)*s is rounded to x's dtype; else it is
    exact. Raises ValueError on tensors that do not fit.
    """
    outputs, rows, columns = _check(x.shape[-1], codes, scales, zeros, bits, block)
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"weight_only takes x in fp16 or bf16, not {x.dtype}")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias {list(bias.shape)} is not one for each of {outputs}")
    inner = x.shape[-1]
    flat = x.reshape(-1, inner).contiguous()
    y = torch.empty((len(flat), outputs), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel():
        from compressor_kernels.linear import weight_only_jit as jit

        tiles = tiles or DecodedTiles(block_m=16 if len(flat) <= 16 else 64)
        fp8 = codes.dtype == torch.float8_e4m3fn
        one = zeros is not None and zeros.dtype == torch.int8
        if zeros is not None:
            zeros = zeros.to(torch.int32) + (1 << (bits - 1)) if one else zeros.contiguous()
        grid = (-(-outputs // tiles.block_n), -(-len(flat) // tiles.block_m))
        jit.weight_only_kernel[grid](
            flat,
            codes.contiguous().view(torch.uint8) if fp8 else codes.contiguous(),
            scales.contiguous(),
            zeros,
            bias,
            y,
            len(flat),
            outputs,
            I=inner,
            WORDS=codes.shape[1],
            BITS=0 if fp8 else bits,
            ROWS=rows,
            COLS=columns,
            GROUPS=-(-inner // columns),
            ONE_ZERO=one,
            BM=tiles.block_m,
            BN=tiles.block_n,
            BK=tiles.block_k,
            ASM=x.is_cuda,
            num_warps=tiles.num_warps,
            num_stages=1,  # gathered words are no tiles to keep several of in shared memory
        )
    return y.view(*x.shape[:-1], outputs)


def weight_only_ref(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int = 8,
    block: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`weight_only` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs)."""
    inner = x.shape[-1]
    outputs, rows, columns = _check(inner, codes, scales, zeros, bits, block)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    down = torch.arange(outputs, device=x.device) // rows
    across = torch.arange(inner, device=x.device) // columns
    if codes.dtype == torch.float8_e4m3fn:
        values = codes.to(exact)
    else:
        values = _unstream(codes, bits, inner).to(exact)
        centre = 1 << (bits - 1)
        if zeros is None:
            values = values - centre
        elif zeros.dtype == torch.int8:
            values = values - (zeros.to(exact) + centre)
        else:
            values = values - _unstream(zeros.t(), bits, outputs).t().to(exact)[:, across]
    weight = values * scales.reshape(-1, -(-inner // columns)).to(exact)[down][:, across]
    y = x.to(exact) @ weight.mT
    return (y if bias is None else y + bias.to(exact)).to(out_dtype or x.dtype)


def _unstream(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, words] to the first `count` codes of each row's stream, int64 [R, count]."""
    words = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    bit = torch.arange(count, device=words.device) * bits
    pair = words[:, bit // 32] | (words[:, bit // 32 + 1] << 32)
    return (pair >> (bit % 32)) & ((1 << bits) - 1)


def _check(
    inner: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    block: tuple[int, int] | None,
) -> tuple[int, int, int]:
    """Outputs, and the outputs and inputs that share a scale."""
    fp8 = codes.dtype == torch.float8_e4m3fn
    if codes.dtype not in (torch.int32, torch.float8_e4m3fn) or codes.dim() != 2 or not inner:
        raise ValueError(f"codes {codes.dtype} {list(codes.shape)} are not int32 or E4M3 [O, ...]")
    if not 1 <= bits <= 8 or (fp8 and bits != 8):
        raise ValueError(f"codes of {bits} bits in {codes.dtype}")
    outputs, width = codes.shape[0], inner if fp8 else -(-inner * bits // 32)
    if codes.shape[1] != width:
        raise ValueError(f"codes {list(codes.shape)} do not hold {inner} inputs of {bits} bits")
    rows, columns = block or (outputs if scales.numel() == 1 else 1, inner)
    if rows < 1 or columns < 1:
        raise ValueError(f"a block of {rows} by {columns}")
    groups = -(-inner // columns)
    if not scales.is_floating_point() or scales.numel() != -(-outputs // rows) * groups:
        raise ValueError(
            f"scales {scales.dtype} {list(scales.shape)} are not one for each {rows} by {columns} "
            f"of [{outputs}, {inner}]"
        )
    if zeros is None:
        return outputs, rows, columns
    fits = zeros.shape == (1,) if zeros.dtype == torch.int8 else rows == 1 or outputs == 1
    if zeros.dtype == torch.int32:
        fits = fits and zeros.shape == (-(-outputs * bits // 32), groups)
    if fp8 or zeros.dtype not in (torch.int8, torch.int32) or not fits:
        raise ValueError(f"zeros {zeros.dtype} {list(zeros.shape)} do not fit {bits} bits")
    return outputs, rows, columns
