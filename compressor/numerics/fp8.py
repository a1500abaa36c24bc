"""FP8 weights: E4M3 codes with a scale per tensor, output channel, group or two-dimensional block.

    scale = absmax/448, rounded to the dtype it is stored in,  code = E4M3(clamp(w/scale, ±448))
A scale that was rounded down leaves quotients just above 448, which saturate; E4M3 has no infinity,
and torch's cast would make them NaN.
"""

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec, spread
from compressor.numerics.int_affine import storable

E4M3_MAX = 448.0


def quantize_fp8(
    weight: Tensor,
    spec: QuantSpec,
    *,
    clip_max: Tensor | None = None,
    amax: Tensor | None = None,
) -> QTensor:
    """Round a weight [out, in] to E4M3 codes on the scales of its spec.

    clip_max  [scale_shape] bound of each scale's share of the weight, which is clamped to it
    amax      absmax [1, 1] in place of the weight's own, for a scale per tensor that several
              weights share
    Raises InputError where groups do not divide the inputs or the weight is not finite.
    """
    absmax = fp8_absmax(weight, spec) if amax is None else amax.float().reshape(1, 1)
    if not bool(torch.isfinite(absmax).all()):
        raise InputError("the weight holds NaN or infinity")
    if clip_max is not None:
        absmax = torch.minimum(absmax, clip_max.float())
    scales = storable_or_one(absmax / E4M3_MAX, spec.scale_dtype)
    codes = fp8_codes(weight, spread(scales, spec, (weight.shape[0], weight.shape[1])))
    return QTensor(spec=spec, codes=codes, scales=scales)


def fp8_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """Nearest E4M3 bytes, uint8; the two broadcast (a column with its scales, say)."""
    quotient = (weight.float() / scales.float()).clamp_(-E4M3_MAX, E4M3_MAX)
    return quotient.to(torch.float8_e4m3fn).view(torch.uint8)


def fp8_absmax(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Largest magnitude of what shares a scale, [scale_shape] float32; edge blocks may be short."""
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, spec.group_size or columns),
        "block": spec.block or (rows, columns),
    }[spec.strategy]
    if spec.strategy == "group" and columns % width:
        raise InputError(f"{columns} inputs do not divide into groups of {width}")
    magnitude = torch.nn.functional.pad(weight.abs(), (0, -columns % width, 0, -rows % height))
    tiles = magnitude.view(magnitude.shape[0] // height, height, -1, width)
    return tiles.amax((1, 3)).float()


def storable_or_one(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in their storage dtype, kept positive and finite; 1 for nothing but zeros."""
    return torch.where(scales == 0, 1, storable(scales, dtype))
