"""What a value becomes when it is quantized as the model runs: inputs of linears, keys and values.

Dynamic scales are absmax/127 (int8) and absmax/448 (fp8 e4m3), as the runtimes' kernels have them;
NVFP4 inputs are plain (static_6), as no runtime chooses between 4 and 6 for them; MXFP4 and MXFP8
inputs have a power of two per 32 by compressed-tensors' rule;
4-bit keys and values are asymmetric with fp16 scale and zero (QoQ, arXiv 2405.04532). Their zero
is an offset in units of the value: a head of one sign keeps its whole range without a wider grid.
"""

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import MXFP4, MXFP8
from compressor.ir.scheme import ActivationSpec, KVSpec
from compressor.numerics.mx import fake_quantize_mx_inputs
from compressor.numerics.nvfp4 import fake_quantize_nvfp4, full_range

MX_INPUTS = {"fp4_e2m1": MXFP4, "fp8_e4m3": MXFP8}
LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0}


def stored_scale(absmax: Tensor, spec: ActivationSpec) -> Tensor:
    """The multiplier [1] float32 of a static or local spec, for a calibrated absmax (any shape)."""
    largest = full_range("static_6") if spec.element == "fp4_e2m1" else LARGEST[spec.element]
    return (absmax.float().amax() / largest).reshape(1)


def fake_quantize_activation(
    x: Tensor, spec: ActivationSpec, scale: Tensor | None = None
) -> Tensor:
    """Inputs of a linear [..., channels] as their quantized form stands for them, in x's dtype.

    scale  the stored multiplier of a static spec, one element; NVFP4's global scale where its
           mode is local
    A dynamic scale per tensor is taken over the last two dimensions: one row of tokens. Raises
    InputError for a form that is not known here, or a static one without its scale.
    """
    if spec.mode == "mx":
        return fake_quantize_mx_inputs(x, MX_INPUTS[spec.element]).to(x.dtype)
    if spec.element == "fp4_e2m1":
        return _nvfp4(x, spec, scale)
    values = x.float()
    if spec.mode == "static":
        if scale is None or scale.numel() != 1:
            raise InputError("a statically quantized input has no single stored scale")
        return _rounded(values, spec.element, scale.to(values).reshape(())).to(x.dtype)
    if spec.mode == "group":
        size = spec.group_size or x.shape[-1]
        if x.shape[-1] % size:
            raise InputError(f"{x.shape[-1]} inputs do not divide into groups of {size}")
        groups = values.reshape(*values.shape[:-1], -1, size)
        return _dynamic(groups, spec.element, (-1,)).flatten(-2).to(x.dtype)
    if spec.mode not in ("token", "tensor"):
        raise InputError(f"{spec.element} inputs with {spec.mode} scales are not evaluated here")
    shared = (-1,) if spec.mode == "token" or x.ndim < 2 else (-2, -1)
    return _dynamic(values, spec.element, shared).to(x.dtype)


def fake_quantize_kv(x: Tensor, spec: KVSpec, scale: Tensor | None = None) -> Tensor:
    """Keys or values [rows, kv_heads, length, head_dim] as the cache gives them back, in x's dtype.

    scale  the stored multiplier of fp8 and int8 caches: one element, or one for each KV head
    Raises InputError where that scale is missing or of another shape.
    """
    values = x.float()
    if spec.element == "int4":
        low, high = torch.aminmax(values, dim=-1, keepdim=True)
        step = ((high - low) / 15).clamp_(max=65504).half().float()
        step = torch.where(step == 0, torch.ones_like(step), step)
        zero = (-low).clamp_(-65504, 65504).half().float()
        codes = ((values + zero) / step).round_().clamp_(0, 15)
        return (codes * step - zero).to(x.dtype)
    if scale is None or scale.numel() not in (1, x.shape[1]):
        raise InputError("a quantized KV cache has no stored scale for each tensor or head")
    spread = scale.to(values).reshape(1, -1, 1, 1)
    return _rounded(values, spec.element, spread).to(x.dtype)


def static_kv_scale(absmax: Tensor, spec: KVSpec) -> Tensor:
    """Multipliers [1] or [kv_heads] of an fp8 or int8 cache for keys or values whose largest
    magnitudes are absmax [kv_heads, head_dim]; 1 for nothing."""
    most = absmax.amax(1) if spec.per == "head" else absmax.amax().reshape(1)
    scale = most.float() / LARGEST[spec.element]
    return torch.where(scale > 0, scale, 1.0)


def _nvfp4(x: Tensor, spec: ActivationSpec, scale: Tensor | None) -> Tensor:
    """Plain NVFP4 blocks under a stored global scale, or under that of each row of tokens."""
    if spec.mode == "local":
        if scale is None or scale.numel() != 1:
            raise InputError("an NVFP4 input has no single stored global scale")
        amax = scale.to(x.device, torch.float32) * full_range("static_6")
        return fake_quantize_nvfp4(x.reshape(-1, x.shape[-1]), amax=amax).reshape(x.shape)
    if spec.mode != "tensor":
        raise InputError(f"NVFP4 inputs with {spec.mode} scales are not evaluated here")
    rows = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x.reshape(1, 1, -1)
    return torch.stack([fake_quantize_nvfp4(row) for row in rows]).reshape(x.shape)


def _dynamic(values: Tensor, element: str, shared: tuple[int, ...]) -> Tensor:
    absmax = values.abs().amax(dim=shared, keepdim=True)
    smallest = torch.finfo(torch.float32).smallest_normal
    return _rounded(values, element, (absmax / LARGEST[element]).clamp(min=smallest))


def _rounded(values: Tensor, element: str, scale: Tensor) -> Tensor:
    """values in units of `scale`, rounded to the element and back."""
    largest = LARGEST[element]
    # Only a static int8 scale lets a value reach the lowest code, which runtimes do not spare.
    lowest = -128.0 if element == "int8" else -largest
    scaled = (values / scale).clamp(lowest, largest)
    codes = scaled.round() if element == "int8" else scaled.to(torch.float8_e4m3fn).float()
    return codes * scale
