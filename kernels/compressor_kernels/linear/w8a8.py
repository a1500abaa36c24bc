"""Products of 8-bit inputs and 8-bit weights: int8 with int32 sums, or E4M3 with fp32 sums.

y = (a · Wᵀ) scaled, + bias, with codes a [M, K] and W [N, K], both as they lie on disk:
  w8a8         y[m, n] = row_scales[m] · column_scales[n] · Σ_k a[m, k] (W[n, k] − z[n])
  w8a8_blocks  Σ over blocks b of K: input_scales[m, b] · weight_scales[n // R, b] · (their part)

Tensor cores sum E4M3 products with fewer bits than fp32 has; unless `fast` they do so over 128
inputs at most before their sum is added in fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.triton.launch import processors

CODES = (torch.int8, torch.float8_e4m3fn)
BLOCK = 128  # inputs that share a scale in `w8a8_blocks`


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """Tokens, outputs and inputs of a tile, rows of tiles that run side by side, warps, depth of
    the pipeline, whether programs stay and take tile after tile, the most registers of a thread,
    so that more programs share a multiprocessor, and whether the upper and the lower half of a
    tile's tokens are multiplied in turn."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 128
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 4
    persistent: bool = False
    registers: int | None = None
    halves: bool = False


def w8a8(
    a: Tensor,
    weight: Tensor,
    *,
    row_scales: Tensor,
    column_scales: Tensor,
    column_zeros: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast: bool = False,
    tiles: ProductTiles | None = None,
) -> Tensor:
    """a [..., K] times weight [N, K], both int8 or both float8_e4m3fn: [..., N] in `out_dtype`.

    row_scales     fp32, one for each token of a, or one for all
    column_scales  any float, one for each output, or one for all
    column_zeros   int8, likewise: what is taken from the codes of int8 weights
    out_dtype      fp16, bf16 or fp32
    int8 sums are exact in int32 up to K = 131,072, with zeros to half of that. Raises ValueError on
    what does not fit.
    """
    rows, count, outputs, _ = _check(a, weight, bias, out_dtype)
    row_scales = _spread(row_scales, count, "row_scales")
    column_scales = _spread(column_scales, outputs, "column_scales")
    zeros = _zeros(column_zeros, outputs, a.dtype)
    y = torch.empty((count, outputs), dtype=out_dtype, device=a.device)
    if y.numel():
        tiles = tiles or _tiles(count, outputs, a.dtype, fast)
        if a.dtype != torch.int8 and not fast and tiles.block_k > BLOCK:
            raise ValueError(f"sums of {tiles.block_k} inputs are not summed apart: fast=True")
        rows, weight = _copyable(rows), _copyable(weight)
        sums = None if zeros is None else rows.sum(1, dtype=torch.int32)
        operands = (rows, weight, row_scales, column_scales, sums, zeros, bias, y)
        _launch(*operands, fast=fast, tiles=tiles)
    return y.view(*a.shape[:-1], outputs)


def w8a8_ref(
    a: Tensor,
    weight: Tensor,
    *,
    row_scales: Tensor,
    column_scales: Tensor,
    column_zeros: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`w8a8` in plain PyTorch, summed in fp64."""
    rows, count, outputs, _ = _check(a, weight, bias, out_dtype)
    row_scales = _spread(row_scales, count, "row_scales").double().expand(count)
    column_scales = _spread(column_scales, outputs, "column_scales").double().expand(outputs)
    zeros, codes = _zeros(column_zeros, outputs, a.dtype), weight.double()
    codes = codes if zeros is None else codes - zeros[:, None]
    y = (rows.double() @ codes.mT) * row_scales[:, None] * column_scales
    y = y if bias is None else y + bias.double()
    return y.to(out_dtype).view(*a.shape[:-1], outputs)


def w8a8_blocks(
    a: Tensor,
    weight: Tensor,
    *,
    input_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tiles: ProductTiles | None = None,
) -> Tensor:
    """`w8a8` with scales for blocks of 128 inputs; the last block of a row may be shorter.

    input_scales   fp32 [..., ceil(K/128)], or one for each token, or one for all
    weight_scales  any float [ceil(N/128), ceil(K/128)], or [N, ceil(K/128)]
    """
    rows, count, outputs, inner = _check(a, weight, bias, out_dtype)
    input_scales, tall = _block_scales(input_scales, weight_scales, count, outputs, inner)
    y = torch.empty((count, outputs), dtype=out_dtype, device=a.device)
    if y.numel():
        from compressor_kernels.linear import w8a8_jit as jit

        side = 64 if count <= 64 else 128
        tiles = tiles or ProductTiles(side, side, BLOCK)
        rows, weight = _copyable(rows), _copyable(weight)
        jit.blocks_kernel[(-(-count // tiles.block_m) * -(-outputs // tiles.block_n),)](
            *_described(rows, weight, tiles),
            input_scales,
            weight_scales.contiguous(),
            bias,
            y,
            count,
            outputs,
            K=rows.shape[1],
            BLOCKS=-(-inner // BLOCK),
            INPUT_BLOCKS=input_scales.shape[1],
            TALL=tall,
            BM=tiles.block_m,
            BN=tiles.block_n,
            BK=BLOCK,
            GROUP_M=tiles.group_m,
            INT8=a.dtype == torch.int8,
            ASM=a.is_cuda,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return y.view(*a.shape[:-1], outputs)


def w8a8_blocks_ref(
    a: Tensor,
    weight: Tensor,
    *,
    input_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`w8a8_blocks` in plain PyTorch, summed in fp64."""
    rows, count, outputs, inner = _check(a, weight, bias, out_dtype)
    input_scales, tall = _block_scales(input_scales, weight_scales, count, outputs, inner)
    each = torch.arange(inner, device=a.device) // BLOCK
    per_row = torch.arange(outputs, device=a.device) // (BLOCK if tall else 1)
    dense = weight.double() * weight_scales.double()[per_row][:, each]
    scaled = input_scales.double()
    scaled = scaled[:, each] if scaled.shape[1] > 1 else scaled
    y = (rows.double() * scaled) @ dense.mT
    y = y if bias is None else y + bias.double()
    return y.to(out_dtype).view(*a.shape[:-1], outputs)


def _launch(
    a: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    row_sums: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    *,
    fast: bool,
    tiles: ProductTiles,
) -> None:
    from compressor_kernels.linear import w8a8_jit as jit

    count, outputs = y.shape
    programs = -(-count // tiles.block_m) * -(-outputs // tiles.block_n)
    if tiles.persistent:
        programs = min(programs, processors(a.device))
    jit.product_kernel[(programs,)](
        *_described(a, weight, tiles),
        row_scales,
        column_scales,
        row_sums,
        zeros,
        bias,
        y,
        count,
        outputs,
        K=a.shape[1],
        ROWS=row_scales.numel() > 1,
        COLUMNS=column_scales.numel() > 1,
        BM=tiles.block_m,
        BN=tiles.block_n,
        BK=tiles.block_k,
        GROUP_M=tiles.group_m,
        INT8=a.dtype == torch.int8,
        EXACT=not fast,
        ASM=a.is_cuda,
        STAY=tiles.persistent,
        HALVES=tiles.halves,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **({} if tiles.registers is None else {"maxnreg": tiles.registers}),
    )


def _described(a: Tensor, weight: Tensor, tiles: ProductTiles) -> tuple[object, object]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not a.is_cuda:  # the interpreter computes with bytes, which the kernel gives their meaning
        a, weight = a.view(torch.int8), weight.view(torch.int8)
    return (
        TensorDescriptor.from_tensor(a, [tiles.block_m // (1 + tiles.halves), tiles.block_k]),
        TensorDescriptor.from_tensor(weight, [tiles.block_n, tiles.block_k]),
    )


def _tiles(count: int, outputs: int, dtype: torch.dtype, fast: bool) -> ProductTiles:
    """Chosen from shapes alone."""
    exact = dtype != torch.int8 and not fast
    if count <= 64:
        return ProductTiles(64, 64, 128 if exact else 256, num_warps=4, num_stages=4)
    if exact and count > 256:
        # Two programs of four warps: one adds in fp32 while the other's tensor cores work. Halves
        # of a tile in turn leave room in registers for the sums apart.
        return ProductTiles(128, 128, 128, num_warps=4, num_stages=3, halves=True)
    if exact or count <= 256 or outputs <= 1024:
        return ProductTiles(128, 128, 128, num_warps=8, num_stages=4)
    return ProductTiles(256, 128, 128) if dtype == torch.int8 else ProductTiles()


def _copyable(x: Tensor) -> Tensor:
    """x itself if the bulk copy engine can read it, or a copy whose rows are whole 16 bytes."""
    if missing := -x.shape[1] % 16:
        padded = x.new_zeros((x.shape[0], x.shape[1] + missing))
        padded[:, : x.shape[1]] = x
        return padded
    return (
        x
        if x.is_contiguous() and x.data_ptr() % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def _spread(scales: Tensor, count: int, name: str) -> Tensor:
    if scales.numel() not in (1, count) or not scales.is_floating_point():
        raise ValueError(f"{name} {list(scales.shape)} are not one, nor one for each of {count}")
    return scales.reshape(-1).contiguous()


def _zeros(zeros: Tensor | None, outputs: int, dtype: torch.dtype) -> Tensor | None:
    """Zero points as int32 [N]."""
    if zeros is None:
        return None
    if dtype != torch.int8 or zeros.dtype != torch.int8 or zeros.numel() not in (1, outputs):
        raise ValueError(f"column_zeros {zeros.dtype} {list(zeros.shape)} beside {dtype} codes")
    return zeros.reshape(-1).to(torch.int32).expand(outputs).contiguous()


def _block_scales(
    input_scales: Tensor, weight_scales: Tensor, count: int, outputs: int, inner: int
) -> tuple[Tensor, bool]:
    """Input scales [count, blocks] or [count, 1], and whether 128 outputs share a weight scale."""
    blocks = -(-inner // BLOCK)
    tall = weight_scales.shape[0] != outputs
    if tuple(weight_scales.shape) != (-(-outputs // BLOCK) if tall else outputs, blocks):
        raise ValueError(f"weight_scales {list(weight_scales.shape)} do not fit {outputs}, {inner}")
    if input_scales.numel() == 1:
        input_scales = input_scales.reshape(1, 1).expand(count, 1)
    elif input_scales.shape[-1] not in (1, blocks):
        raise ValueError(f"input_scales {list(input_scales.shape)} do not fit {blocks} blocks")
    input_scales = input_scales.reshape(-1, input_scales.shape[-1]).contiguous()
    if len(input_scales) != count:
        raise ValueError(f"input_scales are for {len(input_scales)} tokens, not {count}")
    return input_scales, tall


def _check(
    a: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, int, int, int]:
    """a as [M, K], and M, N, K."""
    if a.dtype not in CODES or weight.dtype != a.dtype:
        raise ValueError(f"codes are both int8 or float8_e4m3fn, not {a.dtype} and {weight.dtype}")
    if weight.dim() != 2 or a.dim() < 1 or a.shape[-1] != weight.shape[1] or not weight.shape[1]:
        raise ValueError(f"inputs {list(a.shape)} do not fit a weight {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias {list(bias.shape)} is not one for each of {weight.shape[0]}")
    if out_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"products come in fp16, bf16 or fp32, not {out_dtype}")
    rows = a.reshape(-1, a.shape[-1])
    return rows, rows.shape[0], weight.shape[0], a.shape[-1]
