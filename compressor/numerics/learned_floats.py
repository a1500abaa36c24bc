"""NVFP4 and MXFP4 as differentiable functions, as AutoRound has them.

Each weight is moved by an offset v in units of its block's scale before it is rounded, and a share
β of the largest value A of a block sets its scale; rounding passes gradients on as if it were not
there, and clamping at ±6 stops them:
    NVFP4   scale = E4M3(divisor·A·β/6),         element = E2M1(w·divisor/scale + v)
    MXFP4   scale = 2^(floor(log2(A·β)) − 2),    element = E2M1(w/scale + v)
The divisor is one over the matrix's global scale. Where a scale is zero everything is, and no
gradient comes from there; AutoRound's is NaN, whose sign counts for nothing either.
"""

import torch
from torch import Tensor

from compressor.ir.qtensor import E8M0, NVFP4, QTensor, QuantSpec
from compressor.numerics.learned_grid import straight
from compressor.numerics.mx import BIAS, EXPONENTS
from compressor.numerics.nvfp4 import SCALE_MAX, e2m1_codes, round_e2m1

TINY = 2.0**-126


def learned_scales(largest: Tensor, share: Tensor, divisor: Tensor | None) -> Tensor:
    """Scales of blocks, float32 as they are stored, differentiable in the shares.

    largest  [O, n] largest magnitude of each block;  share  [O, n] of it
    divisor  [1, 1] of NVFP4; None makes powers of two
    """
    if divisor is not None:
        return straight((largest * share * divisor / 6).clamp(max=SCALE_MAX), _e4m3)
    exponents = torch.log2((largest * share).clamp(min=TINY))
    return torch.exp2((straight(exponents, torch.floor) - 2).clamp(-BIAS, EXPONENTS["fp4_e2m1"]))


def learned_elements(
    groups: Tensor, offsets: Tensor, scales: Tensor, divisor: Tensor | None
) -> Tensor:
    """E2M1 values [O, n, g], differentiable in the offsets [O, n, g] and the scales [O, n]."""
    usable = scales > 0
    safe = torch.where(usable, scales, 1.0)
    factor = 1 / safe if divisor is None else divisor / safe
    positions = groups * factor[..., None] + offsets
    plain = divisor is not None
    made = straight(positions.clamp(-6, 6), _e2m1) if plain else _through_exponents(positions)
    return torch.where(usable[..., None], made, 0.0)


def moved_elements(elements: Tensor, offsets: Tensor) -> Tensor:
    """E2M1 values [O, n, g] after offsets in steps of the grid around each, differentiable."""
    moved = elements + offsets * e2m1_step(elements)
    return straight(moved.clamp(-6, 6), _e2m1)


def e2m1_step(elements: Tensor) -> Tensor:
    """How far the neighbour of an E2M1 value is that lies closer to zero, 0.5 below 2."""
    magnitude = elements.abs()
    return torch.where(magnitude <= 2, 0.5, torch.where(magnitude <= 4, 1.0, 2.0))


def floats_qtensor(
    elements: Tensor, scales: Tensor, second: Tensor | None, spec: QuantSpec
) -> QTensor:
    """What elements [O, n, g] and stored scales [O, n] stand for."""
    stored = scales.detach().to(spec.scale_dtype)
    codes = e2m1_codes(elements.detach()).flatten(1)
    return QTensor(spec=spec, codes=codes, scales=stored, second=second)


def searched_scales(q: QTensor, weight: Tensor, diagonal: Tensor) -> QTensor:
    """A weight [O, C] rounded to nearest on scales in the neighbourhood of those of `q` where the
    error of the outputs, if inputs did not depend on each other, is least.

    q         rounded to nearest in NVFP4 or MXFP4: its own scales are the first candidates
    diagonal  [C] of the Gram matrix of the inputs, any positive multiple
    """
    spec = q.spec
    nv = spec == NVFP4
    # Positive numbers of both scale formats are ordered as their bytes are.
    low, high = (1, 126) if nv else (0, BIAS + EXPONENTS["fp4_e2m1"])
    bytes_ = q.scales.view(torch.uint8).int()
    groups = weight.float().view(*q.scales.shape, -1)
    weights = diagonal.float().view(groups.shape[1:])
    second = 1.0 if q.second is None else q.second
    best, chosen = torch.full_like(groups[..., 0], torch.inf), bytes_
    for step in sorted(range(-8, 5) if nv else (-1, 0, 1), key=abs):
        candidate = torch.where(bytes_ > 0, (bytes_ + step).clamp(low, high), bytes_)
        scales = _as_scales(candidate, spec).float() * second
        made = learned_elements(groups, torch.zeros(()), scales, None) * scales[..., None]
        errors = made.sub_(groups).square_().mul_(weights).sum(-1)
        better = errors < best
        best, chosen = torch.where(better, errors, best), torch.where(better, candidate, chosen)
    scales = _as_scales(chosen, spec)
    elements = learned_elements(groups, torch.zeros(()), scales.float() * second, None)
    return floats_qtensor(elements, scales, q.second, spec)


def _as_scales(values: Tensor, spec: QuantSpec) -> Tensor:
    return values.to(torch.uint8).view(torch.float8_e4m3fn if spec == NVFP4 else E8M0)


def _through_exponents(positions: Tensor) -> Tensor:
    """Elements whose gradient goes through each one's own exponent too, as AutoRound's MXFP4."""
    elements, fixed = _e2m1(positions.detach().clamp(-6, 6)), positions.detach()
    slope = torch.where(fixed.abs() >= 1, elements / fixed, 1.0) * (fixed.abs() <= 6)
    return elements + (positions - fixed) * slope


def _e4m3(scales: Tensor) -> Tensor:
    return scales.to(torch.float8_e4m3fn).to(scales.dtype)


def _e2m1(values: Tensor) -> Tensor:
    return round_e2m1(values.clone())
