"""Rounding that can be learned: codes and grids of integers as differentiable functions.

SignRound (arXiv 2309.05516) moves each weight by an offset of its own before it is rounded, and
shrinks the two ends of each group's range. Rounding passes gradients on as if it were not there.
Grids of a group with range [low, high] ∋ 0, b bits, offsets v, shares α and β, round = half to
even, as AutoRound has them:
    none       a = −low·α, h = high·β, scale = ±max(a, h)/2^(b−1), positive where h < a,
               code = clamp(round(w/scale + v), −2^(b−1), 2^(b−1) − 1)
    subtract   scale = (high·β − low·α)/(2^b − 1), zero = round(−low·α/scale),
               code = clamp(round(w/scale + v) + zero, 0, 2^b − 1)
A scale is rounded to the dtype it is stored in in the forward pass alone: a float16 scale in the
graph, as in AutoRound, stores its gradient in float16 too, and tiny ones vanish.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from compressor_kernels.search.group_dot import LARGEST, group_dot, group_dot_ref
from torch import Tensor

from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.numerics.int_affine import check_int_spec


@dataclass(frozen=True, slots=True)
class Range:
    """The smallest and largest weight of each group [O, n], zero included."""

    low: Tensor
    high: Tensor


def grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight [O, C] as groups [O, n, g] that share a scale. Raises InputError for a spec that
    does not fit."""
    check_int_spec(spec, (weight.shape[0], weight.shape[1]))
    return weight.view(*spec.scale_shape(*weight.shape), -1)


def range_of(groups: Tensor) -> Range:
    """The range of groups [O, n, g]."""
    low, high = torch.aminmax(groups, dim=-1)
    return Range(low.clamp(max=0), high.clamp(min=0))


def learned_grid(
    span: Range, low_share: Tensor, high_share: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """Scales [O, n] and integer zeros [O, n], both differentiable; zeros are None where the spec is
    symmetric.

    low_share, high_share  [O, n] of each end of the range
    """
    below, above = -span.low * low_share, span.high * high_share
    if spec.zero == "none":
        absmax = torch.maximum(below, above) / 2 ** (spec.bits - 1)
        scales = _storable(torch.where(above < below, absmax, -absmax), spec.scale_dtype)
        return scales, None
    levels = 2**spec.bits - 1
    scales = _storable((above + below) / levels, spec.scale_dtype)
    return scales, straight(below / scales, torch.round).clamp(0, levels)


def learned_steps(
    groups: Tensor, offsets: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec
) -> Tensor:
    """Codes less their zero point [O, n, g], differentiable in offsets, scales and zeros."""
    steps = straight(groups / scales[..., None] + offsets, torch.round)
    if zeros is None:
        return steps.clamp(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
    zero = zeros[..., None]
    return (steps + zero).clamp(0, 2**spec.bits - 1) - zero


def moved_codes(positions: Tensor, spec: QuantSpec) -> Tensor:
    """The codes nearest to positions between codes, differentiable."""
    return straight(positions, torch.round).clamp(0, 2**spec.bits - 1)


def stretched(scales: Tensor, logs: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales times exp(logs), rounded to their storage dtype, differentiable in the logs."""
    largest = torch.finfo(dtype).max
    moved = (scales * logs.exp()).clamp(-largest, largest)
    return straight(moved, lambda x: x.to(dtype).to(x.dtype))


def scale_gradient(gradient: Tensor, steps: Tensor) -> Tensor:
    """The gradient [O, n] float32 of scales, given that of a weight [O, C] that is steps [O, n, g]
    times them."""
    rows = gradient.reshape(-1, steps.shape[2]), steps.view(-1, steps.shape[2])
    small = gradient.is_cuda and steps.shape[2] <= LARGEST
    return (group_dot if small else group_dot_ref)(*rows).view(steps.shape[:2])


def as_qtensor(steps: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> QTensor:
    """What `learned_steps` [O, n, g] and its grid [O, n] stand for."""
    zero = 2 ** (spec.bits - 1) if zeros is None else zeros.detach()[..., None]
    return QTensor(
        spec=spec,
        codes=(steps.detach() + zero).to(torch.uint8).flatten(1),
        scales=scales.detach().to(spec.scale_dtype),
        zeros=None if zeros is None else zeros.detach().to(torch.uint8),
    )


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to their storage dtype, and then no closer to zero than AutoRound lets them
    come; where that bound rules they have no gradient."""
    info, floor = torch.finfo(dtype), 1e-5 if dtype.itemsize == 2 else 1e-8
    rounded = straight(scales.clamp(info.min, info.max), lambda x: x.to(dtype).to(x.dtype))
    smallest = float(torch.tensor(floor, dtype=dtype))
    return torch.where(rounded < 0, rounded.clamp(max=-smallest), rounded.clamp(min=smallest))


def straight(values: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Rounded values whose gradient is that of the values."""
    return values + (rounding(values) - values).detach()
