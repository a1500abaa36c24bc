"""MXFP4 and MXFP8 weights in files: E8M0 scales are bytes there, read as they are or as uint8."""

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.shared.checks import describe
from compressor.ir.qtensor import E8M0, QuantSpec
from compressor.ir.scheme import ActivationSpec

BLOCK = 32
INPUTS = {element: ActivationSpec(element, "mx", BLOCK) for element in ("fp4_e2m1", "fp8_e4m3")}
"""Inputs of the kind that goes with weights of an element."""


def take_exponents(
    tensors: Mapping[str, Tensor], name: str, *, spec: QuantSpec, shape: tuple[int, int]
) -> Tensor:
    """E8M0 scales of a weight [out, in]; InputError where they do not fit or one is NaN (255)."""
    scales = tensors.get(name)
    if scales is None:
        raise InputError(f"tensor {name!r} is missing")
    expected = spec.scale_shape(*shape)
    if scales.dtype not in (torch.uint8, E8M0) or tuple(scales.shape) != expected:
        raise InputError(f"tensor {name!r} is {describe(scales)}, not uint8 {list(expected)}")
    found = scales.contiguous().view(torch.uint8)
    if bool((found == 255).any()):
        raise InputError(f"tensor {name!r} holds NaN (byte 255)")
    return found.view(E8M0)
