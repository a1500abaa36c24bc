"""Products with MXFP4 and MXFP8 weights as compressed-tensors lays them on disk, and inputs rounded
to the same formats (OCP Microscaling Formats 1.0).

y = x W^T + bias, W[o, i] = code[o, i] * 2^(exponent[o, i // 32] - 127). Tensors:
  codes      weight_packed  uint8 [O, I/2], E2M1 codes, the even input's low, or
             weight         float8_e4m3fn [O, I]
  exponents  weight_scale   uint8 [O, I/32]; 255 is NaN
A code times a power of two is exact in bf16, whose exponents are fp32's, so x is in bf16. Rounded
inputs are, too: what `quantize_mx_inputs` makes multiplies as `mx_values` in bf16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_kernels.linear.weight_only import DecodedTiles

BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOP = {"fp4_e2m1": 2, "fp8_e4m3": 8}
"""The largest element's power of two."""
LARGEST_BYTE = {"fp4_e2m1": 252, "fp8_e4m3": 246}
"""The largest exponent at which all codes are finite."""
ROUND_UP = 0x600000  # the mantissa of 1.75
ROWS = 64


@dataclass(frozen=True, slots=True)
class MXWeight:
    """One weight [O, I] as the tensors above hold it."""

    codes: Tensor
    exponents: Tensor

    def check(self) -> tuple[int, int]:
        """Outputs and inputs. Raises ValueError on tensors that do not fit."""
        return _check(self.codes, self.exponents)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight in plain PyTorch, in any float dtype."""
        return mx_values(self.codes, self.exponents, dtype=dtype)

    def tile(self, rows: slice, columns: slice) -> "MXWeight":
        """A part that starts and ends at whole groups."""
        _, inner = self.check()
        left, right, _ = columns.indices(inner)
        each = inner // self.codes.shape[1]
        return MXWeight(
            self.codes[rows, left // each : right // each],
            self.exponents[rows, left // BLOCK : right // BLOCK],
        )


def mx_matmul(
    x: Tensor,
    codes: Tensor,
    exponents: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tiles: DecodedTiles | None = None,
) -> Tensor:
    """x [..., I] in bf16 times such weights: [..., O] in `out_dtype`, bf16 if not given.

    Weights are exact and sums in fp32. The same inputs give the same bits. Raises ValueError on
    tensors that do not fit.
    """
    outputs, inner = MXWeight(codes, exponents).check()
    if x.dtype != torch.bfloat16 or x.shape[-1] != inner:
        raise ValueError(f"x {x.dtype} {list(x.shape)} is not bf16 [..., {inner}]")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias {list(bias.shape)} is not one for each of {outputs}")
    flat = x.reshape(-1, inner).contiguous()
    y = torch.empty((len(flat), outputs), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel():
        from compressor_kernels.linear import mx_jit as jit

        tiles = tiles or DecodedTiles(block_m=16 if len(flat) <= 16 else 64)
        grid = (-(-outputs // tiles.block_n), -(-len(flat) // tiles.block_m))
        jit.product_kernel[grid](
            flat,
            codes.contiguous().view(torch.uint8),
            exponents.contiguous(),
            bias,
            y,
            len(flat),
            outputs,
            I=inner,
            FP4=codes.dtype == torch.uint8,
            BM=tiles.block_m,
            BN=tiles.block_n,
            BK=tiles.block_k,
            ASM=x.is_cuda,
            num_warps=tiles.num_warps,
        )
    return y.view(*x.shape[:-1], outputs)


def mx_matmul_ref(
    x: Tensor,
    codes: Tensor,
    exponents: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`mx_matmul` in plain PyTorch, computed in fp32 (fp64 for fp64 inputs)."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(exact) @ MXWeight(codes, exponents).dequantize(exact).mT
    return (y if bias is None else y + bias.to(exact)).to(out_dtype or x.dtype)


def mx_values(codes: Tensor, exponents: Tensor, *, dtype: torch.dtype) -> Tensor:
    """What codes [..., I/2] or [..., I] under exponents [..., I/32] stand for, [..., I]."""
    _check(codes, exponents)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    if codes.dtype == torch.uint8:
        table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=exact, device=codes.device)
        values = table[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]
    else:
        values = codes.to(exact)
    scales = exponents.view(torch.float8_e8m0fnu).to(exact)
    return (values * scales.repeat_interleave(BLOCK, dim=-1)).to(dtype)


def quantize_mx_inputs(x: Tensor, *, element: str) -> tuple[Tensor, Tensor]:
    """x [..., K] in fp16, bf16 or fp32 to codes, uint8 [..., K/2] or E4M3 [..., K], and exponents
    uint8 [..., K/32]. The element is fp4_e2m1 or fp8_e4m3.

    With absmax = m·2^e, 1 <= m < 2, the exponent is e less the largest element's, one more from
    m = 1.75 on (the rule of compressed-tensors), and E2M1 saturates up to there. Codes are rounded
    to nearest, ties to even. A group with NaN or infinity has the exponent NaN. The bits are those
    of `quantize_mx_inputs_ref`. Raises ValueError on what does not fit.
    """
    from compressor_kernels.linear import mx_jit as jit

    _check_inputs(x, element)
    fp4 = element == "fp4_e2m1"
    flat, width = x.contiguous(), x.shape[-1] // 2 if fp4 else x.shape[-1]
    codes = torch.empty((*x.shape[:-1], width), dtype=torch.uint8, device=x.device)
    exponents = torch.empty(
        (*x.shape[:-1], x.shape[-1] // BLOCK), dtype=torch.uint8, device=x.device
    )
    groups = exponents.numel()
    if groups:
        jit.inputs_kernel[(-(-groups // ROWS),)](
            flat,
            codes,
            exponents,
            groups,
            FP4=fp4,
            TOP=TOP[element],
            LARGEST=LARGEST_BYTE[element],
            ROUND_UP=ROUND_UP,
            ROWS=ROWS,
            ASM=x.is_cuda,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return (codes if fp4 else codes.view(torch.float8_e4m3fn)), exponents


def quantize_mx_inputs_ref(x: Tensor, *, element: str) -> tuple[Tensor, Tensor]:
    """`quantize_mx_inputs` in plain PyTorch."""
    _check_inputs(x, element)
    groups = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    bits = groups.abs().amax(-1).view(torch.int32)
    biased = (bits >> 23) - TOP[element] + ((bits & 0x7FFFFF) >= ROUND_UP).to(torch.int32)
    byte = biased.clamp(0, LARGEST_BYTE[element])
    inverse = ((254 - byte) << 23).view(torch.float32).unsqueeze(-1)
    byte = torch.where(bits >= 0x7F800000, 255, byte).to(torch.uint8)
    steps = groups * inverse
    if element == "fp8_e4m3":
        return steps.clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), byte
    magnitude = steps.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    magnitude = (magnitude / step).round().mul(step).clamp(max=6)
    index = torch.where(magnitude <= 2, magnitude * 2, (magnitude / 2).floor() + 4)
    codes = (index.to(torch.uint8) | ((groups < 0).to(torch.uint8) << 3)).flatten(-2)
    return codes[..., ::2] | (codes[..., 1::2] << 4), byte


def _check(codes: Tensor, exponents: Tensor) -> tuple[int, int]:
    """Outputs and inputs."""
    if codes.dtype not in (torch.uint8, torch.float8_e4m3fn) or codes.dim() < 1:
        raise ValueError(f"codes {codes.dtype} {list(codes.shape)} are not uint8 or E4M3 [..., I]")
    inner = codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1)
    if inner == 0 or inner % BLOCK:
        raise ValueError(f"{inner} inputs do not divide into groups of {BLOCK}")
    expected = (*codes.shape[:-1], inner // BLOCK)
    if exponents.dtype != torch.uint8 or tuple(exponents.shape) != expected:
        raise ValueError(
            f"exponents {exponents.dtype} {list(exponents.shape)} are not uint8 {list(expected)}"
        )
    return codes.shape[0], inner


def _check_inputs(x: Tensor, element: str) -> None:
    if element not in TOP:
        raise ValueError(f"element {element!r} is none of {', '.join(TOP)}")
    if x.dim() < 1 or x.dtype not in INPUT_DTYPES:
        raise ValueError(f"inputs are fp16, bf16 or fp32 [..., K], not {x.dtype} {list(x.shape)}")
    if x.shape[-1] % BLOCK:
        raise ValueError(f"{x.shape[-1]} channels do not divide into groups of {BLOCK}")
