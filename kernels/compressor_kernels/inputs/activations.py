"""Inputs of linears rounded to int8 or fp8 as the model runs, with a scale for each token.

    scale = absmax / 127 (int8) or absmax / 448 (E4M3),  code = nearest(x / scale), ties to even
The absmax is taken over a token, or over groups of its neighbouring channels. One program holds a
token in registers: it is read once and written once. A given scale stands for all tokens, and
saturates at -128 and 127 or at +-448.
"""

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_CHANNELS = 65536  # of a token or group: what one program can hold in registers


def quantize_tokens(
    x: Tensor,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [..., K] in fp16, bf16 or fp32 to codes [..., K] of `dtype` and fp32 scales [..., K/G].

    dtype       torch.int8 or torch.float8_e4m3fn
    group_size  channels that share a scale; a whole token if None
    scale       fp32, one value for everything, in place of scales of its own; it comes back as is
    A token of zeros gets the smallest normal fp32 as scale, and codes 0; one with NaN or infinity
    gets that as scale. The bits are those of `quantize_tokens_ref`. Raises ValueError on what does
    not fit.
    """
    group = _check(x, dtype, group_size, scale)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    shape = (*x.shape[:-1], x.shape[-1] // group)
    scales = torch.empty(shape, dtype=torch.float32, device=x.device) if scale is None else scale
    if x.numel():
        _launch(x.contiguous(), codes, scales, group=group, static=scale is not None)
    return codes, scales


def quantize_tokens_ref(
    x: Tensor,
    *,
    dtype: torch.dtype,
    group_size: int | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_tokens` in plain PyTorch."""
    group = _check(x, dtype, group_size, scale)
    groups = x.float().unflatten(-1, (-1, group))
    if scale is None:
        absmax = groups.abs().amax(-1)
        # Over a tensor: PyTorch on a GPU would multiply with the reciprocal of a number.
        scales = absmax / torch.full_like(absmax, LARGEST[dtype])
        scales = scales.clamp(min=torch.finfo(torch.float32).smallest_normal)
        steps = groups / scales.unsqueeze(-1)
    else:
        scales = scale
        steps = groups / scale.reshape(())
    lowest = -128.0 if dtype == torch.int8 else -448.0
    steps = steps.clamp(lowest, LARGEST[dtype]).flatten(-2)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), scales


def _launch(x: Tensor, codes: Tensor, scales: Tensor, *, group: int, static: bool) -> None:
    from compressor_kernels.inputs import activations_jit as jit

    count = x.numel() // group
    width = 1 << max(0, group - 1).bit_length()
    rows = max(1, 4096 // width)
    jit.tokens_kernel[(-(-count // rows),)](
        x,
        codes.view(torch.uint8) if codes.dtype != torch.int8 else codes,
        scales,
        count,
        K=group,
        ROWS=rows,
        WIDTH=width,
        INT8=codes.dtype == torch.int8,
        STATIC=static,
        ASM=x.is_cuda,
        num_warps=min(32, max(4, width * rows // 1024)),
        enable_fp_fusion=False,
    )


def _check(x: Tensor, dtype: torch.dtype, group_size: int | None, scale: Tensor | None) -> int:
    """Channels that share a scale."""
    if dtype not in LARGEST:
        raise ValueError(f"tokens are rounded to int8 or float8_e4m3fn, not {dtype}")
    if x.dim() < 1 or x.dtype not in INPUT_DTYPES:
        raise ValueError(f"tokens are fp16, bf16 or fp32 [..., K], not {x.dtype} {list(x.shape)}")
    group = x.shape[-1] if group_size is None else group_size
    if group < 1 or x.shape[-1] % group or group > MOST_CHANNELS:
        raise ValueError(f"{x.shape[-1]} channels in groups of {group} (at most {MOST_CHANNELS})")
    if scale is None:
        return group
    if group_size is not None or scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError("a given scale is one fp32 value, for tokens without groups")
    return group
