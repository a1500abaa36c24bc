"""NVFP4 weights in files: two codes a byte, E4M3 block scales, and a global scale that some files
store as what they divide by and others as what they multiply with."""

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.shared.checks import check_values, describe, take, take_scales
from compressor.ir.qtensor import NVFP4, QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec

BLOCK = 16
SCALE_DTYPE = torch.float8_e4m3fn
LOCAL = ActivationSpec("fp4_e2m1", "local", BLOCK)
"""Inputs with a calibrated global scale and block scales made as the model runs."""
DYNAMIC = ActivationSpec("fp4_e2m1", "tensor", BLOCK)
"""Inputs whose global scale is made as the model runs, too."""


def nvfp4_reason(
    spec: QuantSpec,
    input: ActivationSpec | None,
    shape: tuple[int, int],
    *,
    dynamic: bool = False,
) -> str | None:
    """Why a weight [out, in] and its input are not NVFP4 as files have it, or None.

    dynamic  whether the file has a way to say that inputs have no stored global scale
    """
    if spec != NVFP4:
        return f"it holds E2M1 weights with an E4M3 scale per {BLOCK} inputs and one global scale"
    if shape[1] % BLOCK:
        return f"{shape[1]} inputs do not divide into blocks of {BLOCK}"
    if input is not None and input != LOCAL and not (dynamic and input == DYNAMIC):
        return "inputs are in float, or E2M1 with a calibrated global scale"
    return None


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [..., 2n] below 16 as bytes [..., n]; the even one is the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def check_nvfp4(q: QTensor) -> None:
    """Raise InputError where an NVFP4 QTensor breaks its spec or has no positive global scale."""
    check_values(q)
    second = q.second
    if second is None or tuple(second.shape) != (1, 1) or second.dtype != torch.float32:
        raise InputError("an NVFP4 weight needs one float32 global scale [1, 1]")
    if not bool(second.isfinite()) or not bool(second > 0):
        raise InputError(f"the global scale is {float(second):.3g}, not a positive number")


def read_nvfp4(
    tensors: Mapping[str, Tensor], spec: QuantSpec, *, packed: str, second: Tensor
) -> QTensor:
    """The QTensor of the packed codes of that name, `weight_scale` and a multiplier `second`."""
    codes = tensors.get(packed)
    if codes is None or codes.dtype != torch.uint8 or codes.dim() != 2:
        found = "missing" if codes is None else describe(codes)
        raise InputError(f"tensor {packed!r} is {found}, not a uint8 matrix")
    shape = (codes.shape[0], codes.shape[1] * 2)
    if reason := nvfp4_reason(spec, None, shape):
        raise InputError(f"tensor {packed!r}: {reason}")
    scales = take_scales(tensors, "weight_scale", spec=spec, shape=spec.scale_shape(*shape))
    return QTensor(
        spec=spec, codes=unpack_nibbles(codes), scales=scales, second=second.reshape(1, 1)
    )


def take_number(tensors: Mapping[str, Tensor], name: str, *, shape: tuple[int, ...]) -> Tensor:
    """A positive finite float32 number, [1]."""
    number = take(tensors, name, shape=shape, dtypes=(torch.float32,)).reshape(1)
    if not bool(number.isfinite()) or not bool(number > 0):
        raise InputError(f"tensor {name!r} is {float(number):.3g}, not a positive number")
    return number


def divisor_of(multiplier: Tensor) -> Tensor:
    """The float32 whose rounded reciprocal is the multiplier; where there is none, whose is next
    to it."""
    first = multiplier.reciprocal()
    best, error = first, (first.reciprocal() - multiplier).abs()
    for end in (0.0, torch.inf):
        other = torch.nextafter(first, torch.full_like(first, end))
        off = (other.reciprocal() - multiplier).abs()
        best, error = torch.where(off < error, other, best), torch.minimum(off, error)
    return best
