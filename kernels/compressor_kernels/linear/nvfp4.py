"""Products with NVFP4 weights, read as compressed-tensors and ModelOpt lay them on disk.

y = x W^T + bias, W[o, i] = code[o, i] * scales[o, i // 16] * second. Tensors:
  packed  weight_packed (ModelOpt: weight)  uint8 [O, I/2], E2M1 codes, the even input's low
  scales  weight_scale                      float8_e4m3fn [O, I/16]
  second  the global scale                  fp32 [1], as a multiplier: compressed-tensors stores
                                            1/second, ModelOpt's weight_scale_2 is second itself
Codes and block scales become fp16 or bf16 in registers, where their product is exact; the global
scale multiplies fp32 sums. The kernels are those of `w4a16`: four bytes hold eight inputs of one
output, lowest nibble first, in both formats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.linear.w4a16 import (
    DECODE_TOKENS,
    TILED_TOKENS,
    DecodeTiles,
    TiledTiles,
    decode_product,
    decode_tiles,
    dense_weight,
    tiled_product,
    tiled_tiles,
)

BLOCK = 16
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class NVFP4Weight:
    """One weight [O, I] as the tensors above hold it."""

    packed: Tensor
    scales: Tensor
    second: Tensor

    def check(self) -> tuple[int, int]:
        """Outputs and inputs. Raises ValueError on tensors that do not fit."""
        packed, scales, second = self.packed, self.scales, self.second
        if packed.dim() != 2 or packed.dtype != torch.uint8:
            raise ValueError(f"packed {packed.dtype} {list(packed.shape)} is not uint8 [O, I/2]")
        outputs, inner = packed.shape[0], packed.shape[1] * 2
        if inner == 0 or inner % BLOCK:
            raise ValueError(f"{inner} inputs do not divide into blocks of {BLOCK}")
        fit = (outputs, inner // BLOCK)
        if scales.dtype != torch.float8_e4m3fn or scales.shape != fit:
            raise ValueError(f"scales {scales.dtype} {list(scales.shape)} are not E4M3 {list(fit)}")
        if second.dtype != torch.float32 or second.numel() != 1:
            raise ValueError(f"second {second.dtype} {list(second.shape)} is not one fp32 value")
        return outputs, inner

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight in plain PyTorch, in any float dtype."""
        self.check()
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=exact).to(self.packed.device)
        codes = torch.stack([self.packed & 15, self.packed >> 4], dim=-1).flatten(-2)
        blocks = self.scales.to(exact).repeat_interleave(BLOCK, dim=1)
        return (table[codes.long()] * blocks * self.second.reshape(1).to(exact)).to(dtype)

    def tile(self, rows: slice, columns: slice) -> "NVFP4Weight":
        """A part that starts and ends at whole blocks."""
        left, right, _ = columns.indices(self.packed.shape[1] * 2)
        return NVFP4Weight(
            self.packed[rows, left // 2 : right // 2],
            self.scales[rows, left // BLOCK : right // BLOCK],
            self.second,
        )


def nvfp4_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    second: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tiles: DecodeTiles | TiledTiles | None = None,
) -> Tensor:
    """x [..., I] in fp16 or bf16 times NVFP4 weights: [..., O] in `out_dtype`, x's if not given.

    Sums are in fp32 and weights exact, but for many tokens, where the weight is written out dense
    for cuBLAS and rounded to x's dtype. The same inputs give the same bits. `tiles` names a kernel
    and its shape. Raises ValueError on tensors that do not fit.
    """
    outputs, inner = NVFP4Weight(packed, scales, second).check()
    if x.dtype not in (torch.float16, torch.bfloat16) or x.shape[-1] != inner:
        raise ValueError(f"x {x.dtype} {list(x.shape)} is not fp16 or bf16 [..., {inner}]")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias {list(bias.shape)} is not one value for each of {outputs} outputs")
    out_dtype = out_dtype or x.dtype
    rows = x.reshape(-1, inner).contiguous()
    words, blocks = packed.contiguous().view(torch.int32), scales.contiguous().view(torch.uint8)
    second = second.reshape(1)
    if tiles is None and len(rows) > TILED_TOKENS and out_dtype == x.dtype:
        dense = nvfp4_dequantize(packed, scales, second, dtype=x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(rows, dense, bias).view(*x.shape[:-1], outputs)
    y = torch.empty((len(rows), outputs), dtype=out_dtype, device=x.device)
    if y.numel():
        if tiles is None:
            choose = decode_tiles if len(rows) <= DECODE_TOKENS else tiled_tiles
            tiles = choose(len(rows), outputs, inner, BLOCK)
        launch = decode_product if isinstance(tiles, DecodeTiles) else tiled_product
        launch(rows, words, blocks, None, bias, y, group=BLOCK, tiles=tiles, second=second)
    return y.view(*x.shape[:-1], outputs)


def nvfp4_matmul_ref(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    second: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`nvfp4_matmul` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs)."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(exact) @ NVFP4Weight(packed, scales, second).dequantize(exact).mT
    return (y if bias is None else y + bias.to(exact)).to(out_dtype or x.dtype)


def nvfp4_dequantize(
    packed: Tensor, scales: Tensor, second: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """The dense weight [O, I] in fp16 or bf16, rounded once."""
    _, inner = NVFP4Weight(packed, scales, second).check()
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"nvfp4_dequantize gives fp16 or bf16, not {dtype}")
    return dense_weight(
        packed.contiguous().view(torch.int32),
        scales.contiguous().view(torch.uint8),
        None,
        inner=inner,
        group=BLOCK,
        dtype=dtype,
        second=second.reshape(1),
    )
