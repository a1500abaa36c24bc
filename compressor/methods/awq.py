"""AWQ (arXiv 2306.00978): input channels that see large activations are scaled up before rounding.

The scale of a channel is divided out again by the norm or linear that makes the input, so the model
computes the same function until its weights are rounded. Then bounds are searched at which the
scaled weights of each group are clipped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from compressor_calibration.stats import SiteStats, StatNeeds
from pydantic import Field, model_validator
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.layout import Fold, Linear
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.integers import int_spec
from compressor.methods.common.rounding import enter_of, quantizer_of
from compressor.methods.common.shapes import undivided
from compressor.numerics import fake_quantize, quantize
from compressor.numerics.awq_search import (
    ScaleResult,
    candidate_scales,
    is_plain_int,
    search_clip_gram,
    search_scales_gram,
    search_scales_reference,
)
from compressor.numerics.folding import consumer_scale, fold_changes, source_scale
from compressor.numerics.gram import error_of_parts, relative_error
from compressor.numerics.migration import search_scales_with_inputs
from compressor.ranks.ranks import ALONE, Ranks

TILE = 2**25
"""Weights of a linear whose rounded values are in memory at a time."""


class Awq(Pass):
    """Scale up input channels that see large activations, clip outliers, then round to integers.

    Without `bits` it only changes weights, and searches with the quantizer that comes after it.
    """

    version: ClassVar[int] = 3

    bits: int | None = Field(
        None, ge=2, le=8, description="bits of one weight; null leaves rounding to a later pass"
    )
    group_size: int | None = Field(
        128, ge=1, description="neighbouring inputs that share a scale; null for a whole row"
    )
    symmetric: bool = Field(True, description="grids centred on zero; false stores zero points")
    search: Literal["gram", "reference", "inputs"] = Field(
        "gram",
        description="judge scales by the linears' output error, from the Gram matrix of their "
        "inputs; or (reference) by the output of the module they are in, by running tokens; or "
        "(inputs) by the linears' output error on tokens whose inputs are quantized too",
    )
    duo: bool = Field(False, description="also divide scales by the weights' relative magnitude")
    clip: bool = Field(
        True,
        description="search bounds at which weights of a group are clipped, unless the "
        "quantizer that comes after it searches ranges itself",
    )
    grid: int = Field(20, ge=1, le=1000, description="how many scales are tried for each input")
    search_tokens: int = Field(2048, ge=1, description="tokens that a search other than gram runs")
    min_tokens: int = Field(
        64,
        ge=1,
        description="what fewer tokens went through (a rare expert) is rounded without data",
    )

    @model_validator(mode="after")
    def _grid_needs_bits(self) -> Awq:
        given = self.altered("group_size", "symmetric")
        if self.bits is None and given:
            names = " and ".join(given)
            raise ValueError(f"{names} without bits; give them to the quantizer that comes later")
        return self

    def effects(self) -> Effects:
        scheme = None
        if self.bits is not None:
            scheme = Scheme(int_spec(self.bits, self.group_size, symmetric=self.symmetric))
        return Effects(scheme=scheme, rescales=True, changes_kv=True)

    def needs(self) -> Needs:
        kept = 0 if self.search == "gram" else self.search_tokens
        absmax = self.search == "inputs"
        stats = StatNeeds(absmean=True, absmax=absmax, gram=True, keep_inputs=kept)
        return Needs(stats=stats, rounding=self.bits is None)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        return undivided(context.selected, None if self.bits is None else self.group_size)

    def compile_kernels(
        self, specs: Collection[tuple[QuantSpec, int]], device: torch.device
    ) -> None:
        square = torch.eye(32, device=device)
        relative_error(square, square, square)  # of each row of the report, whatever the spec
        if self.search != "gram":
            return
        # Kernels are made for the size of a group, which may be a whole row.
        for spec, columns in {(spec, spec.group_size or inputs) for spec, inputs in specs}:
            if is_plain_int(spec):
                weight = torch.zeros(32, columns, device=device)
                gram = torch.eye(columns, device=device)
                stored = weight.to(torch.bfloat16)  # as nearly every model is
                search_scales_gram([stored], gram, gram.diagonal(), spec, grid=1)
                search_clip_gram(weight, gram, spec)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        folds = {site_fold.site: site_fold for site_fold in unit.layout.folds}
        coded = {x.name for x in context.coded}

        def search(site: str, ranks: Ranks) -> ScaleResult | None:
            if site not in folds or not self._scalable(folds[site], unit, context, coded):
                return None
            return self._search(folds[site], unit, context, ranks)

        def folded(current: Unit, site: str, found: ScaleResult) -> Unit:
            scales = source_scale(folds[site], found.scales)
            changes = fold_changes(current.tensors, folds[site], unit.layout, scales)
            columns = consumer_scale(folds[site], scales)
            return current.with_changes(changes).with_divisor(site, columns)

        def work_on_output(linear: Linear) -> tuple[int, ScaleResult | None, _Finished]:
            """What an expert's output comes to, whose statistics are there only meanwhile."""
            stats, found = context.stats[linear.site], search(linear.site, ALONE)
            current = unit if found is None else folded(unit, linear.site, found)
            site = _Site(stats, found)
            return stats.tokens, found, self._finish(current, linear, context, site, stats.tokens)

        outputs = [x for x in context.coded if x.role == "expert.down"]
        made = context.ranks.each(outputs, work_on_output, _weights)
        of_output = {x.site: done for x, done in zip(outputs, made, strict=True)}
        of_expert = {x.expert: of_output[x.site][0] for x in outputs}
        sites: dict[str, _Site] = {}
        result, rows, waiting = unit, {}, list[Linear]()

        def finish(linear: Linear) -> _Finished:
            site = sites[linear.site]
            tokens = of_expert.get(linear.expert, site.stats.tokens)
            return self._finish(result, linear, context, site, tokens)

        # Outputs before inputs: a scale is folded into what makes an input before that is rounded,
        # and how many tokens an expert saw is known from its output.
        for name in reversed(unit.layout.sites):
            linears = [x for x in context.coded if x.site == name]
            if not linears:
                continue
            output = of_output.get(name)
            found = search(name, context.ranks) if output is None else output[1]
            if found is not None:
                result = folded(result, name, found)
            if output is not None:
                result = output[2].put(result, linears[0])
                rows[linears[0].name] = output[2].row
                continue
            sites[name] = _Site(context.stats[name], found)
            waiting += linears
            if len(waiting) < context.ranks.world and name != unit.layout.sites[0]:
                continue  # until every rank has something to do
            done = context.ranks.each(waiting, finish, _weights)
            for linear, finished in zip(waiting, done, strict=True):
                result, rows[linear.name] = finished.put(result, linear), finished.row
            # What was observed is stale after this pass: the largest matrix goes before the next
            # linears need as much.
            for site in {linear.site for linear in waiting}:
                sites[site].stats.forget_gram()
            waiting = []
        return PassResult(result, [rows[x.name] for x in context.selected if x.name in rows])

    def _scalable(self, site_fold: Fold, unit: Unit, context: PassContext, coded: Set[str]) -> bool:
        """Whether all that reads the site takes part, and in one grid; a router always does.

        coded  module paths of all that takes part
        """
        readers = [x for x in unit.layout.site_linears(site_fold.site) if x.role != "router"]
        return (
            all(x.name in coded for x in readers)
            and len({context.spec(x) for x in readers}) == 1
            and unit.has_weight(site_fold.source)
            and context.stats[site_fold.site].tokens >= self.min_tokens
        )

    def _search(
        self, site_fold: Fold, unit: Unit, context: PassContext, ranks: Ranks
    ) -> ScaleResult:
        """The scales of a site, judged on weights as they were before anything was folded.

        ranks  that search them together
        """
        readers = [x for x in unit.layout.site_linears(site_fold.site) if x.role != "router"]
        gram = self.search == "gram"
        weights = [unit.narrow_weight(x) if gram else unit.weight(x) for x in readers]
        spec = context.spec(readers[0])
        stats = context.stats[site_fold.site]

        def tie(scales: Tensor) -> Tensor:
            return consumer_scale(site_fold, source_scale(site_fold, scales, "mean"))

        def loss_of(replaced: list[Tensor]) -> float:
            named = {x.name: weight for x, weight in zip(readers, replaced, strict=True)}
            return context.module_loss(site_fold.site, named)

        shared = tie if site_fold.repeat > 1 else None
        if self.search == "inputs":
            ratios = [i / self.grid for i in range(1, self.grid + 1)]
            tried = candidate_scales(stats.absmean, ratios=ratios)
            best = search_scales_with_inputs(
                weights,
                stats.inputs,
                tried if shared is None else torch.stack([shared(scales) for scales in tried]),
                ratios,
                quantizer=quantizer_of(context, readers),
                enter=enter_of(context.schemes[readers[0].name].input, stats.absmax),
            )
            return ScaleResult(best.scales, best.ratio or 0.0, best.losses)
        options: dict[str, Any] = {"grid": self.grid, "duo": self.duo, "tie": shared}
        if not is_plain_int(spec) or any(context.rounding.get(x.name) for x in readers):
            options["quantizer"] = quantizer_of(context, readers)
        # Of a single linear both searches have the same loss, and the Gram matrix has all tokens.
        if self.search == "reference" and len(readers) > 1:
            return search_scales_reference(weights, stats.absmean, loss_of, spec, **options)
        return search_scales_gram(weights, stats.gram, stats.absmean, spec, ranks=ranks, **options)

    def _finish(
        self, unit: Unit, linear: Linear, context: PassContext, site: _Site, tokens: int
    ) -> _Finished:
        """Clip and, if this pass does, round one linear; its report row."""
        spec = context.spec(linear)
        weight = unit.weight(linear)
        informed = tokens >= self.min_tokens
        scales = None if site.found is None else site.found.scales
        options = {}
        made: QTensor | Tensor | None
        values: QTensor | Tensor
        # A quantizer that searches its ranges finds better ones towards weights that are whole.
        clips = self.clip and linear.name not in context.fitted
        if clips and informed and is_plain_int(spec):
            gram = site.stats.gram
            options["clip_max"] = search_clip_gram(weight, gram, spec, scales=scales)
        if self.bits is None:
            values = fake_quantize(weight, spec, **options, **context.rounding.get(linear.name, {}))
            made = _clamped(weight, options["clip_max"]) if options else None
        else:
            values = made = quantize(weight, spec, **options)
        parts = _parts(weight, values, scales)
        row: dict[str, Any] = {
            "linear": linear.name,
            "bits": spec.bits,
            "error": float(error_of_parts(parts, site.stats.gram if informed else None)),
            "error_of": "output" if informed else "weight",
            "ratio": None if site.found is None else site.found.ratio,
        }
        if not informed:
            row |= {"note": "calibration tokens came here: rounded without data", "noted": tokens}
        return _Finished(made, row)


@dataclass(frozen=True, slots=True)
class _Site:
    """An input site: its statistics, and its scales where it is rescaled."""

    stats: SiteStats
    found: ScaleResult | None = None


@dataclass(frozen=True, slots=True)
class _Finished:
    """What becomes of a linear: its codes, its clipped weight, or None where it stays as it is;
    and its report row."""

    made: QTensor | Tensor | None
    row: Mapping[str, Any]

    def put(self, unit: Unit, linear: Linear) -> Unit:
        """The unit with it."""
        if isinstance(self.made, QTensor):
            return unit.with_quantized(linear, self.made)
        return unit if self.made is None else unit.with_weight(linear, self.made)


def _weights(linear: Linear) -> float:
    """How much work a linear is: the products of its errors with a Gram matrix."""
    return float(linear.out_features * linear.in_features**2)


def _parts(
    weight: Tensor, values: QTensor | Tensor, scales: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a weight and of what it became, as many at a time as `TILE` says, without the scales
    of its inputs."""
    count = max(1, TILE // weight.shape[1])
    for first in range(0, weight.shape[0], count):
        rows = slice(first, first + count)
        old = weight[rows]
        new = values.rows(rows).dequantize() if isinstance(values, QTensor) else values[rows]
        yield (old, new) if scales is None else (old / scales, new / scales)


def _clamped(weight: Tensor, bounds: Tensor) -> Tensor:
    """A weight [O, C] cut off at ±bounds [O, groups]."""
    groups = weight.view(*bounds.shape, -1)
    return torch.clamp(groups, -bounds[..., None], bounds[..., None]).view(weight.shape)


PASS = Awq
