"""How far to shrink the range of a group before its grid is fitted to it (QoQ, arXiv 2405.04532).

Both ends of a range shrink by one ratio r, tried from 1 downwards; a group takes the r with the
least error of its part of the output, Δ_g G_gg Δ_gᵀ, from the Gram matrix of the inputs.
"""

import torch
from torch import Tensor

from compressor.ir.qtensor import QuantSpec
from compressor.numerics import quantize
from compressor.numerics.gptq import row_errors

LEAST = 0.2
"""No range is shrunk to less of itself."""


def search_ranges(
    weight: Tensor, gram: Tensor, spec: QuantSpec, *, steps: int = 80
) -> dict[str, Tensor]:
    """Options `clip_min` and `clip_max` of `quantize`, float32 [O, groups], for a weight [O, C]
    with an integer spec per group or channel.

    steps  ratios tried below 1, evenly spaced above `LEAST`
    A row whose whole error tr(δ G δᵀ) does not get smaller keeps its full ranges: groups are judged
    one by one, but share the output, and on two levels of scale a common scale too.
    """
    size = spec.group_in(weight.shape[1])
    groups = weight.shape[1] // size
    blocks = gram.float().view(groups, size, groups, size).diagonal(dim1=0, dim2=2)
    blocks = blocks.permute(2, 0, 1)
    rows = max(1, (2**24 if weight.is_cuda else 2**18) // weight.shape[1])
    found = [
        _search(chunk.float(), gram.float(), blocks, spec, steps=steps)
        for chunk in torch.split(weight, rows)
    ]
    low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    return {"clip_min": low, "clip_max": high}


def _search(
    weight: Tensor, gram: Tensor, blocks: Tensor, spec: QuantSpec, *, steps: int
) -> tuple[Tensor, Tensor]:
    groups = weight.view(weight.shape[0], blocks.shape[0], -1)
    low, high = groups.amin(-1), groups.amax(-1)
    best = torch.ones_like(low)
    smallest = torch.full_like(low, torch.inf)
    for i in range(steps):
        ratio = 1 - (1 - LEAST) * i / steps
        made = quantize(weight, spec, clip_min=low * ratio, clip_max=high * ratio).dequantize()
        delta = (made - weight).view(groups.shape).transpose(0, 1)
        error = ((delta @ blocks) * delta).sum(-1).t()
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        best = torch.where(better, ratio, best)
    full = quantize(weight, spec).dequantize() - weight
    clipped = quantize(weight, spec, clip_min=low * best, clip_max=high * best).dequantize()
    helps = row_errors(clipped - weight, gram) < row_errors(full, gram)
    best = torch.where(helps[:, None], best, 1.0)
    return low * best, high * best
