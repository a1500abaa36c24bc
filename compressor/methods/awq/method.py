"""AWQ (arXiv 2306.00978): input channels that see large activations are scaled up before rounding.

The scale of a channel is divided out again by the norm or linear that makes the input, so the model
computes the same function until its weights are rounded. Then bounds are searched at which the
scaled weights of each group are clipped.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from compressor_calibration.stats import SiteStats, StatNeeds
from pydantic import Field, model_validator
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.floats import Change, home_of
from compressor.ir.layout import Fold, Linear
from compressor.ir.qtensor import QuantSpec
from compressor.ir.same_shape import Linears, groups_of_experts, of_one_shape, stacked
from compressor.ir.scheme import Scheme
from compressor.ir.unit import Unit
from compressor.methods.awq.finish import Finished, Report, Rule, Site, errors_of, finished, put
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.integers import int_spec
from compressor.methods.common.rounding import enter_of, quantizer_of
from compressor.methods.common.shapes import undivided
from compressor.numerics import quantize
from compressor.numerics.awq_clip import search_clip_gram
from compressor.numerics.awq_search import (
    ScaleResult,
    candidate_scales,
    search_scales_apart,
    search_scales_gram,
    search_scales_reference,
)
from compressor.numerics.folding import Rescaled, consumer_scale, fold_changes, source_scale
from compressor.numerics.gram import relative_error
from compressor.numerics.int_affine import is_plain_int
from compressor.numerics.migration import search_scales_with_inputs
from compressor.ranks.ranks import ALONE, Ranks


class Awq(Pass):
    """Scale up input channels that see large activations, clip outliers, then round to integers.

    Without `bits` it only changes weights, and searches with the quantizer that comes after it.
    """

    version: ClassVar[int] = 11

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

    def spreads(self) -> bool:
        return self.bits is not None and self.search == "gram" and not self.duo

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
                stats = SiteStats(columns, self.needs().stats, device=device)
                stats.update(stored)
                search_scales_gram([stored], gram, gram.diagonal(), spec, grid=1)
                options = search_clip_gram(weight, gram, spec).options()
                if self.bits is not None:
                    made = quantize(weight, spec, **options)
                    for scales in (gram.diagonal(), None):
                        errors_of(weight[None], made, scales, gram)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        folds = _scalable(unit, context)
        rule = Rule(self.bits is not None, self.clip, self.min_tokens)
        outputs = [x for x in context.coded if x.role == "expert.down"]
        report, alone = Report(), context.ranks.world == 1
        of_expert: dict[int | None, int] = {}

        def alike(linear: Linear) -> Hashable:
            spec, fold = context.spec(linear), folds.get(linear.site)
            return (
                spec if is_plain_int(spec) else linear.name,
                str(context.rounding.get(linear.name)),
                linear.name in context.fitted,
                fold is not None and fold.repeat,
                None if linear.role == "expert.down" else linear.site,
            )

        def work_on_outputs(linears: Linears) -> _Outputs:
            """What becomes of experts' outputs, whose statistics are there only meanwhile."""
            stats = context.stats_of(linears)
            tokens = [seen.tokens for seen in stats]
            scales = self._search_apart(linears, stats, tokens, unit, context, folds)
            weights = _rescaled(unit.weights(linears), linears, folds, scales)
            sites = [Site(seen, y) for seen, y in zip(stats, scales, strict=True)]
            home = home_of(unit.tensors, linears[0].weight_name)
            done = finished(linears, weights, sites, tokens, context, rule, home)
            return _Outputs(tokens, scales, done if alone else [x.asked() for x in done])

        # Outputs before inputs: a scale is folded into what makes an input before that is rounded,
        # and how many tokens an expert saw is known from its output.
        stacks = of_one_shape(outputs, alike)
        made = context.ranks.each(stacks, work_on_outputs, _work, context.home)
        found: dict[str, ScaleResult] = {}
        for linears, done in zip(stacks, made, strict=True):
            for linear, tokens, scales in zip(linears, done.tokens, done.found, strict=True):
                of_expert[linear.expert] = tokens
                if scales is not None:
                    found[linear.site] = scales
        result = _folded(unit, found, folds)
        result = put(result, stacks, [done.finished for done in made], report)
        del made

        sites: dict[str, Site] = {}
        waiting: list[Linear] = []

        def finish(linears: Linears) -> list[Finished]:
            site = sites[linears[0].site]
            tokens = [of_expert.get(x.expert, site.stats.tokens) for x in linears]
            weights = result.weights(linears)
            home = home_of(result.tensors, linears[0].weight_name)
            every = [site] * len(linears)
            done = finished(linears, weights, every, tokens, context, rule, home)
            return done if alone else [x.asked() for x in done]

        by_site: dict[str, list[Linear]] = {}
        for linear in context.coded:
            if linear.role != "expert.down":
                by_site.setdefault(linear.site, []).append(linear)
        order = [name for name in reversed(unit.layout.sites) if name in by_site]
        for name in order:
            sites[name] = site = Site(context.stats[name])
            if name in folds and site.stats.tokens >= self.min_tokens:
                chosen = self._search(folds[name], unit, context, context.ranks)
                sites[name] = Site(site.stats, chosen)
                result = _folded(result, {name: chosen}, folds)
            waiting += by_site[name]
            if len(waiting) < context.ranks.world and name != order[-1]:
                continue  # until every rank has something to do
            stacks = of_one_shape(waiting, alike)
            ready = context.ranks.each(stacks, finish, _work, context.home)
            result = put(result, stacks, ready, report)
            # What was observed is stale after this pass: the largest matrix goes before the next
            # linears need as much.
            for site_name in {linear.site for linear in waiting}:
                sites[site_name].stats.forget_gram()
            waiting = []
        rows = report.whole()
        return PassResult(result, [rows[x.name] for x in context.selected if x.name in rows])

    def _search_apart(
        self,
        linears: Linears,
        stats: Sequence[SiteStats],
        tokens: Sequence[int],
        unit: Unit,
        context: PassContext,
        folds: Mapping[str, Fold],
    ) -> list[ScaleResult | None]:
        """The scales of experts' outputs; None where too little is known, or nothing can be
        rescaled."""
        found: list[ScaleResult | None] = [None] * len(linears)
        if linears[0].site not in folds:
            return found
        wanted = [i for i, seen in enumerate(tokens) if seen >= self.min_tokens]
        spec = context.spec(linears[0])
        plain = is_plain_int(spec) and not context.rounding.get(linears[0].name)
        if not wanted or self.search == "inputs" or not plain or folds[linears[0].site].repeat > 1:
            for i in wanted:
                found[i] = self._search(folds[linears[i].site], unit, context, ALONE)
            return found
        made = search_scales_apart(
            stacked([unit.narrow_weight(linears[i]) for i in wanted]),
            stacked([stats[i].gram for i in wanted]),
            stacked([stats[i].absmean for i in wanted]),
            spec,
            grid=self.grid,
            duo=self.duo,
        )
        for i, result in zip(wanted, made, strict=True):
            found[i] = result
        return found

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
        apart = groups_of_experts(readers)
        number = {expert: i for i, group in enumerate(apart) for expert in group}
        return search_scales_gram(
            weights,
            stats.gram,
            stats.absmean,
            spec,
            ranks=ranks,
            groups=[-1 if x.expert is None else number.get(x.expert, -1) for x in readers],
            homes=[context.home([x]) for x in readers],
            **options,
        )


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Tokens that experts saw, the scales of their outputs, and what becomes of these."""

    tokens: Sequence[int]
    found: Sequence[ScaleResult | None]
    finished: list[Finished]


def _scalable(unit: Unit, context: PassContext) -> dict[str, Fold]:
    """Site → how it is rescaled, where all that reads it takes part, and in one grid; a router
    always does."""
    coded = {x.name for x in context.coded}
    readers: dict[str, list[Linear]] = {}
    for linear in unit.layout.linears:
        if linear.role != "router":
            readers.setdefault(linear.site, []).append(linear)
    return {
        fold.site: fold
        for fold in unit.layout.folds
        if all(x.name in coded for x in readers.get(fold.site, ()))
        and len({context.spec(x) for x in readers.get(fold.site, ())}) == 1
        and unit.has_weight(fold.source)
    }


def _folded(unit: Unit, found: Mapping[str, ScaleResult], folds: Mapping[str, Fold]) -> Unit:
    """The unit with the inputs of some sites rescaled."""
    changes: dict[str, Change] = {}
    divisors: dict[str, Tensor] = {}
    for site, result in found.items():
        scales = source_scale(folds[site], result.scales)
        # Candidates are positive.
        more = fold_changes(unit.tensors, folds[site], unit.layout, scales, positive=True)
        if not changes.keys().isdisjoint(more):
            unit, changes = unit.with_changes(changes), {}
        changes |= more
        divisors[site] = consumer_scale(folds[site], scales)
    return unit.with_changes(changes).with_divisors(divisors)


def _rescaled(
    weights: Tensor,
    linears: Linears,
    folds: Mapping[str, Fold],
    found: Sequence[ScaleResult | None],
) -> Tensor:
    """Weights [E, out, in] as `_folded` leaves them, where scales were found."""
    columns: dict[int, Tensor] = {}
    for place, (linear, result) in enumerate(zip(linears, found, strict=True)):
        if result is not None:
            fold = folds[linear.site]
            columns[place] = consumer_scale(fold, source_scale(fold, result.scales))
    if not columns:
        return weights
    one = torch.ones_like(next(iter(columns.values())))
    every = [Rescaled(x.name, columns.get(place, one)) for place, x in enumerate(linears)]
    return every[0].of_each(every, weights)


def _work(linears: Linears) -> float:
    """How much work linears are: the products of their errors with a Gram matrix."""
    return float(sum(x.out_features * x.in_features**2 for x in linears))
