"""Rounding to NVFP4 as a model runs: E2M1 codes, E4M3 scales of 16 channels, one global scale.

With A the absmax that the global scale stands for and (M4, M8) = (6, 448), or (6, 256) where 4 and
6 are chosen between, in fp32 and in this order:
    divisor = (M4·M8) / A,   second = 1 / divisor
    scale = E4M3(absmax_block / 6 · divisor)
    code = E2M1(x · (1 / (second · scale))), ties to even, beyond 6 to 6
Four Over Six (arXiv 2512.02010) makes a second candidate with E4M3(1.5 · absmax_block / 6 ·
divisor) and keeps the one with the smaller squared, absolute or largest error; a tie keeps 6.
The published code does not saturate at 6; hardware and this do.
"""

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["static_6", "mse", "mae", "abs_max"]
RULES = ("static_6", "mse", "mae", "abs_max")
BLOCK = 16
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIVISOR_MAX = 2.0**110  # keeps 1 / (second · scale) finite for tensors of almost nothing


def full_range(rule: Rule) -> float:
    """M4·M8."""
    return 6.0 * 448.0 if rule == "static_6" else 6.0 * 256.0


def quantize_nvfp4_inputs(
    x: Tensor, *, rule: Rule = "static_6", amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] in fp16, bf16 or fp32 to packed codes uint8 [..., K/2], E4M3 scales [..., K/16]
    and the global scale, fp32 [1], a multiplier.

    rule  static_6, or how 4 and 6 are chosen between: mse, mae, abs_max
    amax  fp32, one value: a calibrated absmax; x's own if None, which reads x once more
    Channels 2i and 2i + 1 share a byte, the first in its low half. Codes and scales have the bits
    of `quantize_nvfp4_inputs_ref`, but for blocks whose two errors are equal to rounding. Raises
    ValueError on what does not fit.
    """
    from compressor_kernels.inputs import nvfp4_inputs_jit as jit

    amax = _check(x, rule, amax)
    flat = x.contiguous()
    codes = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*x.shape[:-1], x.shape[-1] // BLOCK), dtype=torch.uint8, device=x.device)
    second = torch.empty(1, dtype=torch.float32, device=x.device)
    blocks = scales.numel()
    rows = 256 if rule == "static_6" else 128  # blocks that one program rounds
    # An empty input still has a global scale.
    jit.inputs_kernel[(max(1, -(-blocks // rows)),)](
        flat,
        amax,
        codes.view(torch.int32),
        scales,
        second,
        blocks,
        ROWS=rows,
        RULE=RULES.index(rule),
        RANGE=full_range(rule),
        DIVISOR_MAX=DIVISOR_MAX,
        ASM=x.is_cuda,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scales.view(torch.float8_e4m3fn), second


def quantize_nvfp4_inputs_ref(
    x: Tensor, *, rule: Rule = "static_6", amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_nvfp4_inputs` in plain PyTorch."""
    amax = _check(x, rule, amax)
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    # Over tensors: a number over a tensor would be its reciprocal times the number.
    divisor = (torch.full_like(amax, full_range(rule)) / amax).clamp(max=DIVISOR_MAX)
    divisor = torch.where(amax == 0, torch.ones_like(divisor), divisor)
    second = torch.ones_like(divisor) / divisor
    absmax = blocks.abs().amax(-1, keepdim=True)
    steps = absmax / torch.full_like(absmax, 6.0) * divisor
    values, scales = _rounded(blocks, steps, second)
    if rule != "static_6":
        other, other_scales = _rounded(blocks, steps * 1.5, second)
        four, six = (
            _error(v * (s.float() * second) - blocks, rule)
            for v, s in ((other, other_scales), (values, scales))
        )
        values = torch.where(four < six, other, values)
        scales = torch.where(four < six, other_scales.float(), scales.float()).to(scales.dtype)
    magnitude = values.abs()
    index = torch.where(magnitude <= 2, magnitude * 2, (magnitude / 2).floor() + 4)
    codes = (index.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)).flatten(-2)
    return codes[..., ::2] | (codes[..., 1::2] << 4), scales.squeeze(-1), second.reshape(1)


def _rounded(blocks: Tensor, steps: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 values and E4M3 scales."""
    scales = steps.clamp(max=448.0).to(torch.float8_e4m3fn)
    product = second * scales.float()
    y = torch.where(product == 0, 0.0, blocks * (torch.ones_like(product) / product))
    magnitude = y.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (magnitude / step).round().mul(step).clamp(max=6).mul(y.sign()), scales


def _error(difference: Tensor, rule: Rule) -> Tensor:
    if rule == "mse":
        return difference.square().sum(-1, keepdim=True)
    difference = difference.abs()
    return difference.sum(-1, keepdim=True) if rule == "mae" else difference.amax(-1, keepdim=True)


def _check(x: Tensor, rule: Rule, amax: Tensor | None) -> Tensor:
    """The absmax, fp32 [1]."""
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is none of {', '.join(RULES)}")
    if x.dim() < 1 or x.dtype not in INPUT_DTYPES:
        raise ValueError(f"inputs are fp16, bf16 or fp32 [..., K], not {x.dtype} {list(x.shape)}")
    if x.shape[-1] % BLOCK:
        raise ValueError(f"{x.shape[-1]} channels do not divide into blocks of {BLOCK}")
    if amax is None:
        if not x.numel():
            return torch.zeros(1, dtype=torch.float32, device=x.device)
        return x.abs().amax().float().reshape(1)
    if amax.dtype != torch.float32 or amax.numel() != 1:
        raise ValueError(f"amax {amax.dtype} {list(amax.shape)} is not one fp32 value")
    return amax.reshape(1)
