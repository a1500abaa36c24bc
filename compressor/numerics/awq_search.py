"""AWQ's search of per-channel scales (arXiv 2306.00978); `awq_clip` has that of clipping bounds.

A scale s multiplies a weight's input channels and divides its input, so that only the rounding
changes: y = (W·s)(x/s). The search comes in two forms. The reference form runs tokens, as the
paper's code does. The Gram form needs only G = XᵀX of the inputs: a weight that is off by Δ makes
a squared output error of tr(Δ G Δᵀ), whatever the number of tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QuantSpec
from compressor.numerics import fake_quantize
from compressor.numerics.awq_rows import shortlist, write_deltas
from compressor.numerics.gram import ROWS, difference_error, gram_error, work_dtype
from compressor.numerics.int_affine import is_plain_int
from compressor.numerics.migration import Quantizer
from compressor.ranks.ranks import ALONE, Ranks

SCALE_FLOOR = 1e-4
"""Smallest value of a channel's scale before it is normalised, as in the published code."""

TOGETHER = 4
"""Candidates of a stack that a GPU works out at a time: their errors are as large as the stack in
float64, for which a plan has room."""


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """The outcome of a scale search.

    scales  [C] float32, multiplies the weight's columns
    ratio   exponent of the activation statistic that made them
    losses  loss of each candidate, in the order tried; infinity where some rows showed that it is
            not the best
    """

    scales: Tensor
    ratio: float
    losses: tuple[float, ...]


def weight_magnitude(weights: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """Mean over all rows of |W| / (its group's absmax), [C] float32, for `duo` scaling."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    for weight in weights:
        size = spec.group_in(weight.shape[1])
        groups = weight.float().abs().view(weight.shape[0], -1, size)
        share = groups / (groups.amax(-1, keepdim=True) + 1e-6)
        total += share.view(weight.shape).sum(0)
    return total / sum(weight.shape[0] for weight in weights)


def candidate_scales(
    x_absmean: Tensor, *, ratios: Sequence[float], w_magnitude: Tensor | None = None
) -> Tensor:
    """x^r, or x^r / w^(1−r), normalised so that max·min = 1, for each ratio r: [R, C] float32; or
    of several inputs, [R, E, C].

    x_absmean    [C] or [E, C] mean |x| of the input channels
    w_magnitude  the same shape, from `weight_magnitude`, for AutoAWQ's `duo` scaling
    Channels that calibration never saw (zero or not finite) keep 1 and do not shift the others.
    """
    x = x_absmean.float()
    r = torch.tensor(ratios, dtype=torch.float32).to(x.device, non_blocking=True)
    r = r.view(-1, *[1] * x.dim())
    alive = x.isfinite() & (x > 0)
    scales = torch.where(alive, x, 1.0) ** r
    if w_magnitude is not None:
        scales = scales / (w_magnitude.float() ** (1 - r) + 1e-4)
    scales = scales.clamp(min=SCALE_FLOOR)
    low = torch.where(alive, scales, torch.inf).amin(-1, keepdim=True)
    high = torch.where(alive, scales, 0.0).amax(-1, keepdim=True)
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
    tie: Callable[[Tensor], Tensor] | None = None,
    quantizer: Quantizer | None = None,
) -> ScaleResult:
    """The published search: `grid` ratios from 0 below 1, judged by running tokens.

    weights  linears [O_i, C] that share the input
    loss_of  the replaced weights Q(W·s)/s → loss, e.g. of the module's output
    tie      makes channels agree that must have one scale, [C] → [C]
    quantizer  rounds them together; each by its spec alone if None
    Raises InputError where no candidate has a finite loss.
    """
    ratios = [i / grid for i in range(grid)]
    candidates = _candidates(weights, x_absmean, ratios, spec, duo=duo, tie=tie)
    plain = {"from_range": True} if is_plain_int(spec) else {}

    def rounded(scales: Tensor) -> list[Tensor]:
        scaled = [weight * scales for weight in weights]
        if quantizer is None:
            return [fake_quantize(weight, spec, **plain).div_(scales) for weight in scaled]
        return [weight / scales for weight in quantizer(scaled)]

    losses = [loss_of(rounded(scales)) for scales in candidates]
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
    tie: Callable[[Tensor], Tensor] | None = None,
    quantizer: Quantizer | None = None,
    ranks: Ranks = ALONE,
    groups: Sequence[int] = (),
    homes: Sequence[int | None] = (),
) -> ScaleResult:
    """Scales with the least Σ_i tr(Δ_i G Δ_iᵀ), Δ_i = Q(W_i·s)/s − W_i.

    weights  linears [O_i, C] that share the input
    gram     [C, C] of that input, any positive multiple
    grid     ratios i/grid tried, both ends included; no scaling is always one of the candidates
    tie, quantizer  as in `search_scales_reference`
    ranks    share the candidates; all of them search together
    groups   of the linears, one after the other, whose errors are summed up by themselves first
    homes    the rank that has a linear's weight alone, if one has: a group is at one place
    Raises InputError where no candidate has a finite loss.
    """
    ratios = _ratios(grid, duo=duo)
    candidates = _candidates(weights, x_absmean, ratios[1:], spec, duo=duo, tie=tie)
    candidates = torch.cat([torch.ones_like(candidates[:1]), candidates])
    left = list(range(len(candidates)))
    if quantizer is None:
        stacks = [weight[None] for weight in weights]
        left = shortlist(stacks, gram, candidates, spec, ranks, homes)
        parts = []
        for turn, numbers in enumerate(_numbered(groups or [0] * len(stacks))):
            home = homes[numbers[0]] if homes else None
            mine = left
            if home is None:  # in another turn for each group: a few candidates divide unevenly
                mine = [x for i, x in enumerate(left, turn) if i % ranks.world == ranks.rank]
            part = torch.zeros(len(candidates), 1, dtype=torch.float32, device=gram.device)
            if home in (None, ranks.rank):
                some = [stacks[i] for i in numbers]
                part = _losses(some, gram[None], candidates[:, None], spec, mine)
            parts.append(part[:, 0])
        every = ranks.sum(torch.stack(parts))
        losses = every[0].clone()
        for part in every[1:]:
            losses += part
    else:
        losses = torch.zeros(len(candidates), dtype=torch.float32, device=gram.device)
        for i in ranks.own(len(candidates)):
            scales = candidates[i]
            for old, new in zip(
                weights, quantizer([w.float() * scales for w in weights]), strict=True
            ):
                losses[i] += _gram_loss(old, new / scales, gram)
        losses = ranks.sum(losses)
    found = [x if i in left else math.inf for i, x in enumerate(losses.tolist())]
    best = _first_minimum(found)
    return ScaleResult(candidates[best], ratios[best], tuple(found))


def search_scales_apart(
    weights: Tensor,
    grams: Tensor,
    x_absmean: Tensor,
    spec: QuantSpec,
    *,
    grid: int = 20,
    duo: bool = False,
) -> list[ScaleResult]:
    """`search_scales_gram` of linears of one shape, each of which has an input of its own.

    weights  [E, O, C];  grams  [E, C, C];  x_absmean  [E, C]
    """
    ratios = _ratios(grid, duo=duo)
    magnitude = torch.stack([weight_magnitude([w], spec) for w in weights]) if duo else None
    candidates = candidate_scales(x_absmean, ratios=ratios[1:], w_magnitude=magnitude)
    candidates = torch.cat([torch.ones_like(candidates[:1]), candidates])
    # The same ones together for any number of ranks, of which each has whole stacks.
    together = TOGETHER if weights.is_cuda else 1
    every = range(candidates.shape[0])
    losses = _losses([weights], grams, candidates, spec, every, together=together)
    found = []
    for number, tried in enumerate(losses.T.tolist()):
        best = _first_minimum(tried)
        found.append(ScaleResult(candidates[best, number], ratios[best], tuple(tried)))
    return found


def _ratios(grid: int, *, duo: bool) -> list[float]:
    """The ratio of no scaling, and those that are tried."""
    return [0.0, *(i / grid for i in range(0 if duo else 1, grid + 1))]


def _losses(
    weights: Sequence[Tensor],
    grams: Tensor,
    candidates: Tensor,
    spec: QuantSpec,
    mine: Sequence[int],
    *,
    together: int = 1,
) -> Tensor:
    """Σ_i tr(Δ_i G Δ_iᵀ) of each input for each candidate, float32 [R, E]; zero where it is none of
    `mine`.

    weights     stacks [E, O_i, C] of linears that share an input;  grams  [E, C, C]
    candidates  [R, E, C];  together  how many are worked out at a time, if `mine` are all
    """
    losses = torch.zeros(candidates.shape[:2], dtype=torch.float32, device=grams.device)
    for rows in _row_blocks(weights):
        # One below the other: experts are hundreds of linears, and each would be a kernel.
        block = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        shape = together, *block.shape
        delta = torch.empty(shape, dtype=work_dtype(grams), device=grams.device)
        for first in range(0, len(mine), together):
            # Of several that are worked out together none is left out between them.
            some = slice(mine[first], mine[first : first + together][-1] + 1)
            tried = candidates[some]
            made = delta[: len(tried)]
            write_deltas(block, tried, spec, made)
            losses[some] += gram_error(made.flatten(0, 1), grams).view(len(tried), -1)
    return losses


def _numbered(groups: Sequence[int]) -> list[list[int]]:
    """Places of each group, one after the other."""
    found: list[list[int]] = []
    for place, group in enumerate(groups):
        if not place or group != groups[place - 1]:
            found.append([])
        found[-1].append(place)
    return found


def _gram_loss(old: Tensor, new: Tensor, gram: Tensor) -> Tensor:
    """tr(Δ G Δᵀ) of a weight [O, C] in row blocks."""
    total = torch.zeros((), dtype=torch.float32, device=gram.device)
    for a, b in zip(torch.split(old, ROWS), torch.split(new, ROWS), strict=True):
        total += difference_error(b, a, gram)
    return total


def _candidates(
    weights: Sequence[Tensor],
    x_absmean: Tensor,
    ratios: Sequence[float],
    spec: QuantSpec,
    *,
    duo: bool,
    tie: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Scales to try, [R, C]."""
    magnitude = weight_magnitude(weights, spec) if duo else None
    found = candidate_scales(x_absmean, ratios=ratios, w_magnitude=magnitude)
    return found if tie is None else torch.stack([tie(scales) for scales in found])


def _row_blocks(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of row ranges of weights [1, O_i, C], each of `ROWS` rows or fewer; larger stacks are
    as small as they should be."""
    block: list[Tensor] = []
    if len(weights[0]) > 1:
        yield list(weights)
        return
    for part in (part for weight in weights for part in torch.split(weight, ROWS, dim=1)):
        if block and sum(p.shape[1] for p in block) + part.shape[1] > ROWS:
            yield block
            block = []
        block.append(part)
    yield block


def _first_minimum(losses: Sequence[float]) -> int:
    """Index of the first strict minimum, NaN passed over; InputError where all are NaN or Inf."""
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise InputError(
            "no scale candidate has a finite loss",
            hint="the calibration inputs of this block hold NaN or Inf; try dtype bfloat16",
        )
    return min(finite, key=losses.__getitem__)
