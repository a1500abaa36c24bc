"""QoQ's weights (arXiv 2405.04532): unsigned 4-bit codes with zero points in units of the value.

Progressive, per group, on two levels of scale:
    s0 = float16(absmax_row / P)                   one per output channel
    t  = clamp(w / s0, ±P)                         in units of an int8 value, not rounded to it
    s1 = clamp(round((max − min)/15), ≤ 127), 0 → 1   one integer per group
    offset      z = clamp(round(−min), −128, 127),  q = clamp(round((t + z)/s1), 0, 15),
                int8 value = q·s1 − z
    subtract    range widened to hold 0,  z = clamp(round(−min/s1), 0, 15),
                q = clamp(round(t/s1 + z), 0, 15),  int8 value = (q − z)·s1
P is the protective range, the largest at which no int8 value leaves [−128, 127]: 120 for `offset`
(what the published configurations use) and 119 for `subtract` (the paper's form).

Plain offset, per channel or group:
    s = float16((max − min)/15), 0 → 1,  z = float16(−min),  q = clamp(round((w + z)/s), 0, 15)

An offset reaches a range that does not hold zero as it is, so such ranges are not widened. Scales
and offsets are rounded, though, and a group of one sign (or of values near the smallest float16)
may lose more by that than a symmetric grid, s = max|t|/8, on the same levels of scale: it takes
that one where its squared error is smaller, which the published code does not.
"""

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.numerics.fp8 import storable_or_one
from compressor.numerics.int_affine import RANGE_FLOOR

PROTECTIVE_RANGE = {"offset": 120.0, "subtract": 119.0}
SMALLEST_NORMAL_HALF = 2.0**-14
SMALL_HALF = 2.0**-16
"""Below it float16 steps are so coarse that rounding a scale shortens its range."""
SYMMETRIC_LEVELS = 8


def quantize_progressive(
    weight: Tensor,
    spec: QuantSpec,
    *,
    clip_max: Tensor | None = None,
    clip_min: Tensor | None = None,
) -> QTensor:
    """Round a weight [out, in] to 4-bit codes on int8 group scales and float16 channel scales.

    clip_max, clip_min  [scale_shape] bounds in units of the weight, which is clamped to them
                        first; clip_min is −clip_max where it is not given
    Raises InputError for a spec of another kind and where groups do not divide the inputs.
    """
    _check(spec, weight, scale_dtype=torch.int8)
    bound = PROTECTIVE_RANGE[spec.zero]
    exact = _grouped(weight, spec, clip_max=clip_max, clip_min=clip_min)
    largest = exact.abs().amax((1, 2))
    second = storable_or_one(largest / bound, torch.float16).float().view(-1, 1)
    groups = (exact / second.unsqueeze(-1)).clamp_(-bound, bound)
    low, high = groups.amin(-1), groups.amax(-1)
    degenerate = _one_sign(low, high) | (second < SMALLEST_NORMAL_HALF)
    extreme = torch.maximum(-low, high)
    if spec.zero == "subtract":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scales = _group_scales((high - low) / _levels(spec))
    symmetric = _group_scales(extreme / SYMMETRIC_LEVELS)
    centre = _symmetric_centre(low, high)
    if spec.zero == "subtract":
        zeros = (-low / scales).round_().clamp_(0, _levels(spec))
    else:
        zeros = (-low).round_().clamp_(-128, 127)
        centre = centre * symmetric
    grids = ((scales, zeros), (symmetric, centre))
    scales, zeros = _prefer_symmetric(
        groups, *grids, where=degenerate, spec=spec, exact=exact, second=second
    )
    scales = scales.to(torch.int8)
    zeros = zeros.to(torch.uint8 if spec.zero == "subtract" else torch.int8)
    codes = offset_codes(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), spec=spec)
    codes = codes.view(weight.shape)
    return QTensor(spec=spec, codes=codes, scales=scales, zeros=zeros, second=second)


def progressive_codes(
    weight: Tensor, scales: Tensor, zeros: Tensor, second: Tensor, *, spec: QuantSpec
) -> Tensor:
    """Nearest codes on given scales; all tensors broadcast (a column with its scales, say)."""
    bound = PROTECTIVE_RANGE[spec.zero]
    values = (weight.float() / second).clamp_(-bound, bound)
    return offset_codes(values, scales, zeros, spec=spec)


def quantize_offset(
    weight: Tensor,
    spec: QuantSpec,
    *,
    clip_max: Tensor | None = None,
    clip_min: Tensor | None = None,
) -> QTensor:
    """Round a weight [out, in] to codes with float16 scales and zero points q·s − z, one per
    channel or group. Options and errors as in `quantize_progressive`."""
    _check(spec, weight, scale_dtype=torch.float16)
    groups = _grouped(weight, spec, clip_max=clip_max, clip_min=clip_min)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = storable_or_one((high - low) / _levels(spec), torch.float16).float()
    absmax = torch.maximum(-low, high).clamp(min=RANGE_FLOOR)  # as symmetric weights have it
    symmetric = storable_or_one(absmax / SYMMETRIC_LEVELS, torch.float16).float()
    grids = ((scales, _half(-low)), (symmetric, _half(_symmetric_centre(low, high) * symmetric)))
    degenerate = _one_sign(low, high) | (scales < SMALL_HALF)
    scales, zeros = _prefer_symmetric(
        groups, *grids, where=degenerate, spec=spec, exact=groups, second=torch.ones_like(scales)
    )
    scales, zeros = scales.to(torch.float16), zeros.to(torch.float16)
    codes = offset_codes(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), spec=spec).view(
        weight.shape
    )
    return QTensor(spec=spec, codes=codes, scales=scales, zeros=zeros)


def offset_codes(weight: Tensor, scales: Tensor, zeros: Tensor, *, spec: QuantSpec) -> Tensor:
    """Nearest codes uint8 on given scales and zero points of either form; all tensors broadcast."""
    scales, zeros = scales.float(), zeros.float()
    if spec.zero == "offset":
        steps = (weight.float() + zeros) / scales
    else:
        steps = weight.float() / scales + zeros
    return steps.round_().clamp_(0, _levels(spec)).to(torch.uint8)


def _one_sign(low: Tensor, high: Tensor) -> Tensor:
    return (low >= 0) | (high <= 0)


def _symmetric_centre(low: Tensor, high: Tensor) -> Tensor:
    """The code of zero on a symmetric grid whose extreme lies on one of its ends, or a code above
    that still reaches it where no value has the other sign: an offset of 0 is exact."""
    centre = torch.where(high > -low, float(SYMMETRIC_LEVELS - 1), float(SYMMETRIC_LEVELS))
    return torch.where(low >= 0, 0.0, centre)


def _prefer_symmetric(
    groups: Tensor,
    grid: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    *,
    where: Tensor,
    spec: QuantSpec,
    exact: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups] of the one grid, and of the other `where` that one has
    the smaller squared error.

    groups  in units of `second` [out, 1], clamped;  exact  what they stand for, not clamped
    """
    rows = where.any(-1)
    if not bool(rows.any()):
        return grid
    target = exact[rows].double() / second[rows].unsqueeze(-1)
    errors = []
    for scales, zeros in grid, other:
        scales, zeros = scales[rows].unsqueeze(-1), zeros[rows].unsqueeze(-1)
        codes = offset_codes(groups[rows], scales, zeros, spec=spec).double()
        offset = spec.zero == "offset"
        values = codes * scales - zeros if offset else (codes - zeros) * scales
        errors.append((values - target).square_().sum(-1))
    better = where.clone()
    better[rows] &= errors[1] < errors[0]
    return torch.where(better, other[0], grid[0]), torch.where(better, other[1], grid[1])


def _check(spec: QuantSpec, weight: Tensor, *, scale_dtype: torch.dtype) -> None:
    two_levels = spec.second == "channel"
    known = spec.zero in PROTECTIVE_RANGE if two_levels else spec.zero == "offset"
    strategies = ("group",) if two_levels else ("group", "channel")
    if not known or spec.strategy not in strategies or spec.scale_dtype != scale_dtype:
        raise InputError("not a spec of QoQ's weights", hint=f"got {spec}")
    if spec.strategy == "group" and (not spec.group_size or weight.shape[1] % spec.group_size):
        raise InputError(
            f"{weight.shape[1]} inputs do not divide into groups of {spec.group_size}",
            hint="choose a group size that divides every targeted linear's inputs",
        )


def _grouped(
    weight: Tensor, spec: QuantSpec, *, clip_max: Tensor | None, clip_min: Tensor | None
) -> Tensor:
    """[out, groups, size] in float32, clamped to its bounds."""
    size = spec.group_in(weight.shape[1])
    groups = weight.float().reshape(weight.shape[0], -1, size)
    if clip_max is None:
        return groups
    high = clip_max.float().unsqueeze(-1)
    low = -high if clip_min is None else clip_min.float().unsqueeze(-1)
    return torch.minimum(torch.maximum(groups, low), high)


def _group_scales(steps: Tensor) -> Tensor:
    """Integer scales 1 … 127 of groups, in float."""
    rounded = steps.round().clamp_(max=127)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _half(values: Tensor) -> Tensor:
    """Values rounded to a finite float16."""
    return values.clamp(-65504, 65504).to(torch.float16).float()


def _levels(spec: QuantSpec) -> int:
    return int(2**spec.bits - 1)
