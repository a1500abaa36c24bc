"""Searches of AWQ (arXiv 2306.00978): per-channel scales, then clipping bounds per group.

A scale s multiplies a weight's input channels and divides its input, so that only the rounding
changes: y = (W·s)(x/s). Each search comes in two forms. The reference form runs tokens, as the
paper's code does. The Gram form needs only G = XᵀX of the inputs: a weight that is off by Δ makes
a squared output error of tr(Δ G Δᵀ), whatever the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.numerics import fake_quantize
from compressor.qtensor import QuantSpec

SCALE_FLOOR = 1e-4
"""Smallest value of a channel's scale before it is normalised, as in the published code."""


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """The outcome of a scale search.

    scales  [C] float32, multiplies the weight's columns
    ratio   exponent of the activation statistic that made them
    losses  loss of each candidate, in the order tried
    """

    scales: Tensor
    ratio: float
    losses: tuple[float, ...]


def weight_magnitude(weights: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """Mean over all rows of |W| / (its group's absmax), [C] float32, for `duo` scaling."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    for weight in weights:
        size = (spec.group_size if spec.strategy == "group" else None) or weight.shape[1]
        groups = weight.float().abs().view(weight.shape[0], -1, size)
        share = groups / (groups.amax(-1, keepdim=True) + 1e-6)
        total += share.view(weight.shape).sum(0)
    return total / sum(weight.shape[0] for weight in weights)


def candidate_scales(
    x_absmean: Tensor, *, ratio: float, w_magnitude: Tensor | None = None
) -> Tensor:
    """x^ratio, or x^ratio / w^(1−ratio), normalised so that max·min = 1: [C] float32.

    x_absmean    [C] mean |x| of the input channels
    w_magnitude  [C] from `weight_magnitude`, for AutoAWQ's `duo` scaling
    Channels that calibration never saw (zero or not finite) keep 1 and do not shift the others.
    """
    x = x_absmean.float()
    alive = x.isfinite() & (x > 0)
    scales = torch.where(alive, x, 1.0).pow(ratio)
    if w_magnitude is not None:
        scales = scales / (w_magnitude.float().pow(1 - ratio) + 1e-4)
    scales = scales.clamp(min=SCALE_FLOOR)
    if not alive.any():
        return torch.ones_like(x)
    low, high = torch.aminmax(scales[alive])
    scales = scales / (high.sqrt() * low.sqrt())
    return torch.where(alive & scales.isfinite() & (scales > 0), scales, 1.0)


def search_scales_reference(
    weights: Sequence[Tensor],
    x_absmean: Tensor,
    loss_of: Callable[[list[Tensor]], float],
    spec: QuantSpec,
    *,
    grid: int = 20,
    duo: bool = False,
    options: Mapping[str, Any] | None = None,
) -> ScaleResult:
    """The published search: `grid` ratios from 0 below 1, judged by running tokens.

    weights  linears [O_i, C] that share the input
    loss_of  the replaced weights Q(W·s)/s → loss, e.g. of the module's output
    options  keywords of `quantize`
    Raises InputError where no candidate has a finite loss.
    """
    magnitude = weight_magnitude(weights, spec) if duo else None
    ratios = [i / grid for i in range(grid)]
    candidates = [candidate_scales(x_absmean, ratio=r, w_magnitude=magnitude) for r in ratios]
    losses = [
        loss_of([fake_quantize(w * s, spec, **(options or {})).div_(s) for w in weights])
        for s in candidates
    ]
    best = _first_minimum(losses)
    return ScaleResult(candidates[best], ratios[best], tuple(losses))


def search_scales_gram(
    weights: Sequence[Tensor],
    gram: Tensor,
    x_absmean: Tensor,
    spec: QuantSpec,
    *,
    grid: int = 20,
    duo: bool = False,
    options: Mapping[str, Any] | None = None,
) -> ScaleResult:
    """Scales with the least Σ_i tr(Δ_i G Δ_iᵀ), Δ_i = Q(W_i·s)/s − W_i.

    weights  linears [O_i, C] that share the input
    gram     [C, C] of that input, any positive multiple
    grid     ratios i/grid tried, both ends included; no scaling is always one of the candidates
    Raises InputError where no candidate has a finite loss.
    """
    magnitude = weight_magnitude(weights, spec) if duo else None
    ratios = [0.0] + [i / grid for i in range(0 if duo else 1, grid + 1)]
    candidates = [torch.ones_like(x_absmean, dtype=torch.float32)] + [
        candidate_scales(x_absmean, ratio=r, w_magnitude=magnitude) for r in ratios[1:]
    ]
    rows = sum(weight.shape[0] for weight in weights)
    delta = torch.empty(rows, gram.shape[0], dtype=_matmul_dtype(gram), device=gram.device)
    losses = []
    for scales in candidates:
        for weight, part in zip(
            weights, torch.split(delta, [w.shape[0] for w in weights]), strict=True
        ):
            work = weight.float()
            part.copy_(
                fake_quantize(work * scales, spec, **(options or {})).div_(scales).sub_(work)
            )
        losses.append(gram_error(delta, gram))
    found = torch.stack(losses).tolist()
    best = _first_minimum(found)
    return ScaleResult(candidates[best], ratios[best], tuple(found))


def gram_error(delta: Tensor, gram: Tensor, *, columns: int = 0) -> Tensor:
    """tr(Δ G Δᵀ) of an error Δ [O, C], as a scalar tensor.

    Computed as Σ_jk (ΔᵀΔ)_jk G_jk over the upper half only, `columns` columns at a time, so the
    Gram matrix is never rounded: on a GPU Δ comes in bfloat16 (its 2⁻⁹ is far below what separates
    two candidates) and the products are summed and multiplied with G in float32.
    """
    width = delta.shape[1]
    step = columns or (2048 if delta.is_cuda else 192)
    total = torch.zeros((), dtype=gram.dtype, device=delta.device)
    for start in range(0, width, step):
        stop = min(start + step, width)
        products = _product(delta[:, start:stop].t(), delta[:, start:])
        products.mul_(gram[start:stop, start:])
        total += products[:, : stop - start].sum() + 2 * products[:, stop - start :].sum()
    return total


def search_clip_reference(
    weight: Tensor,
    inputs: Tensor,
    spec: QuantSpec,
    *,
    grid: int = 20,
    max_shrink: float = 0.5,
    tokens: int = 512,
) -> Tensor:
    """The published clipping search: bounds [O, groups] with the least error of each group's part
    of the output, over every (T // tokens)-th of the inputs [T, C]."""
    chosen = inputs[:: max(1, inputs.shape[0] // tokens)].to(weight.dtype)
    size = _clip_group_size(weight, spec)
    x = chosen.view(chosen.shape[0], -1, size).transpose(0, 1)

    def error(delta: Tensor) -> Tensor:
        return (delta.transpose(0, 1) @ x.transpose(1, 2)).square().mean(-1).t()

    return _search_clip(weight, error, spec, grid=grid, max_shrink=max_shrink, options=None)


def search_clip_gram(
    weight: Tensor,
    gram: Tensor,
    spec: QuantSpec,
    *,
    scales: Tensor | None = None,
    grid: int = 20,
    max_shrink: float = 0.5,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Bounds [O, groups] that give the least Δ_g G_gg Δ_gᵀ in each group of each row.

    weight  [O, C] as it will be quantized, scales included
    gram    [C, C] of the input before it was divided by `scales` [C]
    """
    size = _clip_group_size(weight, spec)
    groups = weight.shape[1] // size
    blocks = gram.view(groups, size, groups, size).diagonal(dim1=0, dim2=2)
    blocks = blocks.permute(2, 0, 1).to(torch.float32)
    if scales is not None:
        per_group = scales.view(-1, size)
        blocks = blocks / (per_group[:, :, None] * per_group[:, None, :])

    def error(delta: Tensor) -> Tensor:
        by_group = delta.transpose(0, 1)
        errors: Tensor = ((by_group @ blocks) * by_group).sum(-1)
        return errors.t()

    return _search_clip(
        weight.float(), error, spec, grid=grid, max_shrink=max_shrink, options=options
    )


def _search_clip(
    weight: Tensor,
    error_of: Callable[[Tensor], Tensor],
    spec: QuantSpec,
    *,
    grid: int,
    max_shrink: float,
    options: Mapping[str, Any] | None,
) -> Tensor:
    """Bounds absmax·(1 − i/grid) with the least error, for i below max_shrink·grid.

    error_of  error [rows, n, g] of grouped weights → squared output error [rows, n]
    """
    size = _clip_group_size(weight, spec)
    rows = max(1, (2**24 if weight.is_cuda else 2**18) // weight.shape[1])
    bounds = []
    for chunk in torch.split(weight, rows):
        absmax = chunk.view(chunk.shape[0], -1, size).abs().amax(-1)
        best, least = absmax.clone(), torch.full_like(absmax, torch.inf)
        for i in range(int(max_shrink * grid)):
            bound = absmax * (1 - i / grid)
            delta = fake_quantize(chunk, spec, clip_max=bound, **(options or {})).sub_(chunk)
            error = error_of(delta.view(chunk.shape[0], -1, size))
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, bound, best)
        bounds.append(best)
    return torch.cat(bounds)


def _clip_group_size(weight: Tensor, spec: QuantSpec) -> int:
    """Inputs that share one bound; InputError for scales that span rows."""
    if spec.strategy not in ("channel", "group"):
        raise InputError(
            f"clipping bounds need scales per group or channel, not per {spec.strategy}",
            hint="turn clipping off for this target",
        )
    return (spec.group_size if spec.strategy == "group" else None) or weight.shape[1]


def _first_minimum(losses: Sequence[float]) -> int:
    """Index of the first strict minimum, NaN passed over; InputError where all are NaN or Inf."""
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise InputError(
            "no scale candidate has a finite loss",
            hint="the calibration inputs of this block hold NaN or Inf; try dtype bfloat16",
        )
    return min(finite, key=losses.__getitem__)


def _matmul_dtype(gram: Tensor) -> torch.dtype:
    return torch.bfloat16 if gram.is_cuda else gram.dtype


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right summed in float32 where the factors are bfloat16."""
    if left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
