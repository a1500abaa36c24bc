"""Clips and rounds linears whose inputs have been rescaled, experts of one shape together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from compressor_calibration.stats import SiteStats
from compressor_kernels.search.int_rounding import rounding_errors
from torch import Tensor

from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor
from compressor.ir.same_shape import Linears, stacked
from compressor.ir.unit import Unit
from compressor.methods.common.context import PassContext
from compressor.numerics import fake_quantize, quantize
from compressor.numerics.awq_clip import search_clip_gram
from compressor.numerics.awq_search import ScaleResult
from compressor.numerics.gram import error_of_parts, gram_error, share_of
from compressor.numerics.int_affine import GridOptions, is_plain_int, rounded_at_once

TILE = 2**25
"""Weights of a linear whose rounded values are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done to linears.

    rounds      whether they get codes here
    clip        whether bounds are searched at which weights are clipped
    min_tokens  what saw fewer is rounded without data
    """

    rounds: bool
    clip: bool
    min_tokens: int


@dataclass(frozen=True, slots=True)
class Site:
    """An input site: its statistics, and its scales where it is rescaled."""

    stats: SiteStats
    found: ScaleResult | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """What becomes of linears of one shape.

    places  of which of them
    made    the codes of all, one after the other, the clipped weights, or None where they stay as
            they are
    rows    of the report, but for errors;  errors  one of each: to ask waits for the device
    """

    places: Sequence[int]
    made: QTensor | Tensor | None
    rows: Sequence[Mapping[str, Any]]
    errors: Tensor | Sequence[float]

    def asked(self) -> Finished:
        """The same with errors as numbers, which no process gets as a shape."""
        errors = self.errors
        return replace(self, errors=errors.tolist() if isinstance(errors, Tensor) else errors)


@dataclass(frozen=True, slots=True)
class Report:
    """Rows of linears by name, whose errors are asked for all at once.

    errors  of some linears each, in the order in which rows came
    """

    rows: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    errors: list[Tensor | Sequence[float]] = field(default_factory=list)

    def whole(self) -> dict[str, Mapping[str, Any]]:
        """The rows with their errors."""
        waiting = [x for x in self.errors if isinstance(x, Tensor)]
        told = iter(torch.cat(waiting).tolist() if waiting else [])
        errors = [
            error
            for some in self.errors
            for error in ([next(told) for _ in some] if isinstance(some, Tensor) else some)
        ]
        every = zip(self.rows.items(), errors, strict=True)
        return {name: {**row, "error": error} for (name, row), error in every}


def finished(
    linears: Linears,
    weights: Tensor,
    sites: Sequence[Site],
    tokens: Sequence[int],
    context: PassContext,
    rule: Rule,
    home: torch.device | None,
) -> list[Finished]:
    """Clip and, if this pass does, round linears of one shape; their report rows.

    weights  [E, out, in], as they are after all that was folded
    tokens   that each has seen
    home     where what becomes of them waits, if elsewhere
    """
    seen = [i for i, count in enumerate(tokens) if count >= rule.min_tokens]
    unseen = [i for i in range(len(linears)) if i not in seen]
    found = []
    for places, informed in ((seen, True), (unseen, False)):
        if not places:
            continue
        first = linears[places[0]]
        spec = context.spec(first)
        whole = len(places) == len(linears)
        stack = weights if whole else stacked([weights[i] for i in places])
        of_site = [sites[i] for i in places]
        gram = _shared([site.stats.gram for site in of_site]) if informed else None
        scales = None
        if of_site[0].found is not None:
            scales = _shared([site.found.scales for site in of_site if site.found is not None])
        weight = stack.flatten(0, 1)
        options: GridOptions = {}
        # A quantizer that searches its ranges finds better ones towards weights that are whole.
        clips = rule.clip and first.name not in context.fitted
        if clips and gram is not None and is_plain_int(spec):
            options = search_clip_gram(stack, gram, spec, scales=scales).options()
        made: QTensor | Tensor | None
        values: QTensor | Tensor
        if not rule.rounds:
            rounding = context.rounding.get(first.name, {})
            bounds = options.get("clip_max")
            values = weight if bounds is None else _clamped(weight, bounds)
            made = None if bounds is None else values
            values = fake_quantize(values, spec, **rounding)
        else:
            values = made = quantize(weight, spec, **options)
        errors = errors_of(stack, values, scales, gram)
        rows = []
        for i in places:
            result = sites[i].found
            row: dict[str, Any] = {
                "linear": linears[i].name,
                "bits": spec.bits,
                "error": None,
                "error_of": "output" if informed else "weight",
                "ratio": None if result is None else result.ratio,
            }
            if not informed:
                row["note"] = "calibration tokens came here: rounded without data"
                row["noted"] = tokens[i]
            rows.append(row)
        made = made if made is None else made.to(home or made.device)
        found.append(Finished(places, made, rows, errors))
    return found


def put(
    unit: Unit,
    stacks: Sequence[Linears],
    made: Sequence[Sequence[Finished]],
    report: Report,
) -> Unit:
    """The unit with what became of linears, whose rows are added."""
    coded: list[tuple[Linear, QTensor]] = []
    clipped: dict[str, Tensor] = {}
    for linears, every in zip(stacks, made, strict=True):
        for done in every:
            report.errors.append(done.errors)
            for number, (place, row) in enumerate(zip(done.places, done.rows, strict=True)):
                linear = linears[place]
                report.rows[linear.name] = row
                part = slice(number * linear.out_features, (number + 1) * linear.out_features)
                if isinstance(done.made, QTensor):
                    coded.append((linear, done.made.rows(part)))
                elif done.made is not None:
                    clipped[linear.weight_name] = done.made[part]
    return unit.with_tensors(clipped).with_codes(coded)


def _shared(tensors: Sequence[Tensor]) -> Tensor:
    """What all have, or a stack of what each has."""
    return tensors[0] if all(x is tensors[0] for x in tensors) else torch.stack(list(tensors))


def errors_of(
    stack: Tensor, values: QTensor | Tensor, scales: Tensor | None, gram: Tensor | None
) -> Tensor:
    """Relative output errors [E] of weights [E, O, C] and what they became, or errors of weights
    where there is no Gram matrix."""
    if gram is None or not isinstance(values, QTensor) or not rounded_at_once(stack, values.spec):
        return error_of_parts(_parts(stack, values, scales), gram)
    errors, powers = [], []
    count, _, width = stack.shape
    step = max(1, TILE // width) if count == 1 else stack.shape[1]
    for first in range(0, stack.shape[1], step):
        part = stack[:, first : first + step]
        some = values if part.shape == stack.shape else values.rows(slice(first, first + step))
        delta, before = rounding_errors(
            part,
            some.codes,
            some.scales,
            some.zeros,
            bits=some.spec.bits,
            group_size=width // some.scales.shape[1],
            by=scales,
        )
        errors.append(gram_error(delta, gram))
        powers.append(gram_error(before, gram))
    return share_of(errors, powers)


def _parts(
    stack: Tensor, values: QTensor | Tensor, scales: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights [E, O, C] and what they became, without the scales of their inputs; of a single one
    as many rows at a time as `TILE` says."""
    count, height, width = stack.shape
    step = max(1, TILE // width) if count == 1 else count * height
    weight = stack.flatten(0, 1)
    for first in range(0, count * height, step):
        rows = slice(first, first + step)
        old = weight[rows].view(count, -1, width)
        new = values.rows(rows).dequantize() if isinstance(values, QTensor) else values[rows]
        new = new.view(old.shape)
        by = None if scales is None else scales[..., None, :]
        yield (old, new) if by is None else (old / by, new / by)


def _clamped(weight: Tensor, bounds: Tensor) -> Tensor:
    """A weight [O, C] cut off at ±bounds [O, groups]."""
    groups = weight.view(*bounds.shape, -1)
    return torch.clamp(groups, -bounds[..., None], bounds[..., None]).view(weight.shape)
