"""AWQ's search of bounds at which scaled weights of each group are clipped (arXiv 2306.00978)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from compressor_kernels.search.awq_candidate import CLIP_SIZES, clip_bounds
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QuantSpec
from compressor.numerics.int_affine import GridOptions, group_range, is_plain_int, nearest_int

CLIP_GRID, CLIP_STEPS = 20, 10
"""Bounds are tried in steps of 1/20 of the largest magnitude, down to more than half of it."""


@dataclass(frozen=True, slots=True)
class Clipping:
    """What was found for each group of each row.

    bounds  at which weights are clipped
    signed  of an asymmetric spec, whether the symmetric grid does better under its bound
    """

    bounds: Tensor
    signed: Tensor | None = None

    def options(self) -> GridOptions:
        """Of the rounding that was searched, for the weights of a stack one above the other."""
        bounds, signed = (
            None if x is None else x.reshape(-1, x.shape[-1]) for x in (self.bounds, self.signed)
        )
        return {"clip_max": bounds, "from_range": True, "signed": signed}


def search_clip_gram(
    weight: Tensor,
    gram: Tensor,
    spec: QuantSpec,
    *,
    scales: Tensor | None = None,
) -> Clipping:
    """Bounds [O, groups] that give the least Δ_g G_gg Δ_gᵀ in each group of each row; of a stack
    of weights [E, O, groups].

    Zero points write symmetric grids too, which are searched beside those of ranges: with 2 or 3
    bits most groups do better on them.

    weight  [O, C] or [E, O, C] as it will be quantized, scales included
    gram    [C, C] of the input before it was divided by `scales` [C]; of a stack [E, C, C] and
            [E, C], or those of the one input of all
    """
    shape = weight.shape[:-1]
    if weight.dim() == 3 and gram.dim() == 2:
        weight = weight.flatten(0, 1)
    size = clip_group_size(weight, spec)
    groups = weight.shape[-1] // size
    blocks = gram.view(*gram.shape[:-2], groups, size, groups, size).diagonal(dim1=-4, dim2=-2)
    blocks = blocks.movedim(-1, -3).to(torch.float32)
    if scales is not None:
        per_group = scales.view(*scales.shape[:-1], groups, size)
        blocks = blocks / (per_group[..., :, None] * per_group[..., None, :])
    bounds, signed = _searched(weight, blocks, spec)
    bounds = bounds.view(*shape, groups)
    return Clipping(bounds, None if signed is None else signed.view(bounds.shape))


def _searched(weight: Tensor, blocks: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """The parts of `Clipping`, [O, groups] or [E, O, groups].

    blocks  [groups, g, g] or [E, groups, g, g], the diagonal of the Gram matrix
    """
    if weight.is_cuda and blocks.shape[-1] in CLIP_SIZES:
        bounds, _, signed = clip_bounds(
            weight.contiguous(),
            blocks.contiguous(),
            bits=spec.bits,
            symmetric=spec.symmetric,
            stored=spec.scale_dtype,
            grid=CLIP_GRID,
            steps=CLIP_STEPS,
        )
        return bounds, signed
    if weight.dim() == 3:
        parts = [_searched(w, b, spec) for w, b in zip(weight, blocks, strict=True)]
        signs = [signed for _, signed in parts if signed is not None]
        return torch.stack([bounds for bounds, _ in parts]), torch.stack(signs) if signs else None

    def error(delta: Tensor) -> Tensor:
        by_group = delta.transpose(0, 1)
        errors: Tensor = (by_group @ blocks).mul_(by_group).sum(-1)
        return errors.t()

    bounds, errors = search_clip(weight.float(), error, spec)
    if spec.symmetric:
        return bounds, None
    others, rivals = search_clip(weight.float(), error, replace(spec, zero="none"))
    better = rivals < errors
    return torch.where(better, others, bounds), better


def search_clip(
    weight: Tensor, error_of: Callable[[Tensor], Tensor], spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Bounds absmax·(1 − i/CLIP_GRID) with the least error, for i below CLIP_STEPS, and the errors.

    error_of  error [rows, n, g] of grouped weights → squared output error [rows, n]
    """
    size = clip_group_size(weight, spec)
    rows = max(1, (2**24 if weight.is_cuda else 2**20) // weight.shape[1])
    bounds, errors = [], []
    for chunk in torch.split(weight, rows):
        absmax = chunk.view(chunk.shape[0], -1, size).abs().amax(-1)
        best, least = absmax.clone(), torch.full_like(absmax, torch.inf)
        span, delta = group_range(chunk, spec), torch.empty_like(chunk)
        for i in range(CLIP_STEPS):
            bound = absmax * (1 - i / CLIP_GRID)
            nearest_int(chunk, spec, out=delta, span=span, clip_max=bound).sub_(chunk)
            error = error_of(delta.view(chunk.shape[0], -1, size))
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, bound, best)
        bounds.append(best)
        errors.append(least)
    return torch.cat(bounds), torch.cat(errors)


def clip_group_size(weight: Tensor, spec: QuantSpec) -> int:
    """Inputs that share one bound. Raises InputError for grids that no range decides."""
    if not is_plain_int(spec):
        raise InputError(
            f"clipping bounds need an integer grid per group or channel, not {spec}",
            hint="turn clipping off for this target",
        )
    return spec.group_in(weight.shape[-1])
