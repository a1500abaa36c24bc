"""Rounds the linears of a unit with GPTQ, site by site, whatever their grid."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from compressor_calibration.stats import SiteStats
from torch import Tensor

from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor
from compressor.ir.same_shape import of_one_shape, stacked
from compressor.ir.unit import Unit
from compressor.methods.common.context import PassContext
from compressor.methods.common.rounding import quantize_all
from compressor.numerics import quantize
from compressor.numerics.gptq import InverseFactor, Rounded, gptq, inverse_factor
from compressor.numerics.gptq_stack import gptq_stack, inverse_factors
from compressor.numerics.gram import output_error
from compressor.numerics.grid_search import search_grid
from compressor.numerics.learned_floats import searched_scales
from compressor.numerics.target_correction import correction
from compressor.ranks.ranks import ALONE, Ranks

Start = Callable[[Unit, Sequence[Linear], SiteStats], Mapping[str, QTensor]]

HALVED = {"cpu": 2**24, "cuda": 2**22}
"""Weights of a site that are rounded in two halves where all ranks work on it together: with fewer
the loop over inputs takes as long for a half as for all."""

MOVED = 1.0
"""How far a correction may move a weight, in units of its own rounding error. Where all linears
have the same bits it moved none by more than 0.54 of that. By many times it moved linears behind
others of fewer bits, and behind attention that chooses its keys, where the quantized model chooses
other keys than the original.
"""


class GptqOptions(NamedTuple):
    """How GPTQ is run.

    damping     share of the Gram matrix's mean diagonal that is added to it
    act_order   round the inputs with the largest values first
    min_tokens  what fewer tokens went through is rounded to nearest
    descent     sweeps of coordinate descent after GPTQ, and after each refit
    refits      times that the scales of integers are refitted to the codes
    correction  share of the correction for inputs that differ from the original model's
    """

    damping: float = 0.01
    act_order: bool = True
    min_tokens: int = 64
    descent: int = 0
    refits: int = 0
    correction: float = 0.0


def round_unit(
    unit: Unit,
    context: PassContext,
    options: GptqOptions,
    *,
    search: bool = False,
    start: Start | None = None,
) -> tuple[Unit, list[dict[str, Any]]]:
    """The unit with every selected linear that has a spec quantized, and a report row for each.

    search  whether the grids that are kept are searched
    start   how linears of one site of a unit are rounded to nearest, on the grid that is to be
            kept; where None, as the plan says
    Where targets are corrected, a site is observed after those before it have been rounded.
    """
    corrects = options.correction > 0 and context.observe is not None
    stacks_allowed = start is None and not (options.descent or options.refits)
    if search:
        start = partial(searched, context, options.min_tokens)
    by_site: dict[str, list[Linear]] = {}
    for linear in context.coded:
        by_site.setdefault(linear.site, []).append(linear)
    coded = {site: by_site[site] for site in _order(unit, forwards=corrects) if site in by_site}
    # Outputs before inputs: how many tokens an expert saw is known from its output.
    outputs = [s for s, linears in coded.items() if linears[0].role == "expert.down"]
    of_expert: dict[int | None, int] = {}
    rows: dict[str, dict[str, Any]] = {}
    current = unit

    def nearest(aim: Unit, linears: Sequence[Linear], stats: SiteStats) -> Mapping[str, QTensor]:
        if start is not None:
            return start(aim, linears, stats)
        made = quantize_all(context, linears, [aim.weight(x) for x in linears])
        return {x.name: q for x, q in zip(linears, made, strict=True)}

    def work(site: str) -> _Site:
        linears = coded[site]
        aim, divisor, ranks = current, unit.divisors.get(site), ALONE
        together = corrects and context.observe is not None and not _routed(linears)
        if together and context.observe is not None:
            stats, ranks = context.observe(current, site), context.ranks
        else:
            stats = context.stats[site]

        # Whether less is solved for what a weight becomes than for what multiplies any.
        few = sum(x.out_features for x in linears) < linears[0].in_features

        def corrected() -> Tensor | None:
            if not together or stats.tokens < options.min_tokens:
                return None
            weights = [current.weight(x).float() for x in linears] if few else []
            return correction(
                stats.gram,
                stats.cross,
                strength=options.correction,
                divisor=divisor,
                weight=torch.cat(weights) if few else None,
            )

        def factored() -> InverseFactor | None:
            found = inverse_factor(
                stats.gram,
                damping=options.damping,
                act_order=options.act_order,
                divisor=divisor,
            )
            # All ranks have the matrix itself.
            return None if found is None else replace(found, gram=found.gram[:0])

        def halves() -> Iterator[Any]:
            """The correction, and the factor; alone one after the other, since each takes much
            memory."""
            if ranks.world == 1:
                yield corrected()
                yield factored()
            else:
                yield from ranks.each((corrected, factored), lambda half: half())

        both = halves()
        aim = _moved(current, linears, next(both), few)
        starts = nearest(aim, linears, stats)
        if (within := _within_rounding(aim, current, linears, starts)) is not aim:
            aim, starts = within, nearest(within, linears, stats)
        tokens = {x.name: of_expert.get(x.expert, stats.tokens) for x in linears}
        informed = [x for x in linears if tokens[x.name] >= options.min_tokens]
        inverse: InverseFactor | None = next(both) if informed else None
        del both
        if inverse is not None:
            # A part of what was gathered would keep the room of all ranks.
            factor = inverse.factor if ranks.world == 1 else inverse.factor.clone()
            inverse = replace(inverse, gram=stats.gram.float(), factor=factor)
        parts = 1
        if together and sum(math.prod(x.shape) for x in informed) >= HALVED[stats.gram.device.type]:
            parts = 2
        found = _solve(aim, context, informed, starts, inverse, options, ranks, parts)
        done = _Site(stats.tokens, {})
        for linear in linears:
            rounded = found.get(linear.name)
            q = starts[linear.name] if rounded is None else rounded.q
            row = _row(linear, q, rounded, None if inverse is None else inverse.damping)
            if rounded is None:
                row["error"] = output_error(current.weight(linear), q.dequantize(), None)
                if linear in informed:
                    row["note"] = "its Gram matrix is not finite: rounded to nearest"
                else:
                    row["note"] = "calibration tokens came here: rounded to nearest"
                    row["noted"] = tokens[linear.name]
            done.linears[linear.name] = current.where_it_waits(linear, q), row
        return done

    def alike(linear: Linear) -> Hashable:
        spec = context.spec(linear)
        plain = spec.element == "int" and spec.rows_apart and spec.zero != "offset"
        return (spec, lowest_code(context, linear)) if stacks_allowed and plain else linear.name

    def work_on(sites: Sequence[str]) -> list[_Site]:
        """Experts' outputs of one shape together, where their inputs have been seen."""
        found: dict[str, _Site] = {}
        if len(sites) > 1:
            found = _work_apart(current, context, [coded[s][0] for s in sites], options, search)
        return [found.get(site) or work(site) for site in sites]

    inputs = [site for site in coded if site not in outputs]
    stacks = of_one_shape([coded[site][0] for site in outputs], alike)
    of_outputs = [[linear.site for linear in stack] for stack in stacks]
    waves = [of_outputs, [[site] for site in inputs]]
    if corrects:
        plain = [site for site in inputs if not _routed(coded[site])]
        routed = [[site] for site in inputs if site not in plain]
        waves = [*([[site]] for site in plain), of_outputs, routed]
    for wave in waves:
        if corrects and wave and not _routed(coded[wave[0][0]]):
            made = [work_on(sites) for sites in wave]  # which all ranks do together
        else:
            made = context.ranks.each(
                wave, work_on, lambda sites: sum(_work(coded[site]) for site in sites)
            )
        codes: list[tuple[Linear, QTensor]] = []
        every = [
            (site, done)
            for sites, of in zip(wave, made, strict=True)
            for site, done in zip(sites, of, strict=True)
        ]
        for site, done in every:
            for linear in coded[site]:
                if linear.role == "expert.down":
                    of_expert[linear.expert] = done.tokens
                q, rows[linear.name] = done.linears[linear.name]
                codes.append((linear, q))
        current = current.with_codes(codes)
    return current, [rows[x.name] for x in context.selected if x.name in rows]


class _Site(NamedTuple):
    """What became of a site: the tokens that it saw, and each linear's codes and report row."""

    tokens: int
    linears: dict[str, tuple[QTensor, dict[str, Any]]]


def _work_apart(
    unit: Unit,
    context: PassContext,
    linears: Sequence[Linear],
    options: GptqOptions,
    search: bool,
) -> dict[str, _Site]:
    """Linears of one shape, each of a site of its own, by their sites; those are left out that saw
    few tokens, or whose Gram matrix is of no use."""
    every = list(zip(linears, context.stats_of(linears), strict=True))
    seen = [(x, stats) for x, stats in every if stats.tokens >= options.min_tokens]
    if not seen:
        return {}
    weights = stacked([unit.weight(x) for x, _ in seen]).float()
    inverses = inverse_factors(
        stacked([stats.gram for _, stats in seen]),
        damping=options.damping,
        act_order=options.act_order,
        divisors=[unit.divisors.get(x.site) for x, _ in seen],
    )
    first, flat = seen[0][0], weights.flatten(0, 1)
    spec, lowest = context.spec(first), lowest_code(context, first)
    if search:
        diagonals = inverses.gram.diagonal(dim1=1, dim2=2)
        starts = search_grid(flat, diagonals, spec, narrow=bool(lowest))
    else:
        starts = quantize(flat, spec, **context.rounding.get(first.name, {}))
    made = gptq_stack(weights, starts, inverses, lowest=lowest)
    found: dict[str, _Site] = {}
    for (x, stats), rounded, damping, usable in zip(
        seen, made, inverses.damping, inverses.usable, strict=True
    ):
        if usable:
            q, row = unit.where_it_waits(x, rounded.q), _row(x, rounded.q, rounded, damping)
            found[x.site] = _Site(stats.tokens, {x.name: (q, row)})
    return found


def _work(linears: Sequence[Linear]) -> float:
    """How much work a site is: a factorization, and a product for each of its linears."""
    size = linears[0].in_features
    return float(size**3 + size**2 * sum(x.out_features for x in linears))


def _order(unit: Unit, *, forwards: bool) -> list[str]:
    """The sites in the order in which they are worked on. Experts' outputs come before their
    inputs: how many tokens an expert saw is known from its output."""
    sites = list(reversed(unit.layout.sites))
    if not forwards:
        return sites
    routed = [site for site in sites if _routed(unit.layout.site_linears(site))]
    return [site for site in unit.layout.sites if site not in routed] + routed


def _routed(linears: Sequence[Linear]) -> bool:
    """Whether a site is one of experts, to which two models may send different tokens."""
    return any(x.expert is not None for x in linears)


def _moved(unit: Unit, linears: Sequence[Linear], found: Tensor | None, few: bool) -> Unit:
    """The unit with the weights that linears of one site should have on its inputs.

    found  what weights change by where they have few rows, [all rows, C]; else what each of them
           is multiplied by for it, [C, C]
    """
    if found is None:
        return unit
    parts = torch.split(found, [x.out_features for x in linears]) if few else ()
    for number, linear in enumerate(linears):
        weight = unit.weight(linear)
        change = parts[number] if few else weight.float() @ found
        unit = unit.with_weight(linear, weight + change)
    return unit


def _within_rounding(
    aim: Unit, unit: Unit, linears: Sequence[Linear], starts: Mapping[str, QTensor]
) -> Unit:
    """What a unit was corrected to, with weights moved by no more than `MOVED` allows."""
    if aim is unit:
        return aim
    found = aim
    for linear in linears:
        before, after = unit.weight(linear).float(), aim.weight(linear).float()
        moved = float((after - before).norm())
        most = MOVED * float((starts[linear.name].dequantize() - after).norm())
        if moved > most:
            weight = before + (most / moved) * (after - before)
            found = found.with_weight(linear, weight.to(aim.weight(linear).dtype))
    return found


def _solve(
    unit: Unit,
    context: PassContext,
    linears: Sequence[Linear],
    starts: Mapping[str, QTensor],
    inverse: InverseFactor | None,
    options: GptqOptions,
    ranks: Ranks,
    parts: int,
) -> dict[str, Rounded]:
    """Linears that share an input and a spec are worked on together.

    ranks, parts  as `gptq` has them
    """
    found: dict[str, Rounded] = {}
    if inverse is None:
        return found
    kinds = {x.name: (starts[x.name].spec, lowest_code(context, x)) for x in linears}
    for kind in dict.fromkeys(kinds.values()):
        alike = [x for x in linears if kinds[x.name] == kind]
        weights = [unit.weight(x) for x in alike]
        made = gptq(
            weights,
            [starts[x.name] for x in alike],
            inverse,
            lowest=kind[1],
            descent=options.descent,
            refits=options.refits,
            ranks=ranks,
            parts=parts,
        )
        found |= {x.name: rounded for x, rounded in zip(alike, made, strict=True)}
    return found


def searched(
    context: PassContext,
    min_tokens: int,
    unit: Unit,
    linears: Sequence[Linear],
    stats: SiteStats,
) -> dict[str, QTensor]:
    """Linears of one site rounded to nearest on searched grids."""
    floats = [x for x in linears if context.spec(x).element != "int"]
    plain = linears if stats.tokens < min_tokens else floats
    # What is fused shares a scale, so that all of it is rounded together.
    made = quantize_all(context, plain, [unit.weight(x) for x in plain])
    found = {x.name: q for x, q in zip(plain, made, strict=True)}
    if stats.tokens < min_tokens:
        return found
    diagonal = stats.gram.diagonal()
    for x in floats:
        found[x.name] = searched_scales(found[x.name], unit.weight(x), diagonal)
    integers = [x for x in linears if x.name not in found]
    for stack in of_one_shape(integers, lambda x: (context.spec(x), lowest_code(context, x))):
        weight = stacked([unit.weight(x) for x in stack]).flatten(0, 1)
        narrow = bool(lowest_code(context, stack[0]))
        made_of = search_grid(weight, diagonal, context.spec(stack[0]), narrow=narrow)
        parts = made_of.parts(len(stack))
        found |= {x.name: q for x, q in zip(stack, parts, strict=True)}
    return found


def lowest_code(context: PassContext, linear: Linear) -> int:
    """The least code of a linear's grid; a correction may not go below it."""
    symmetric = context.spec(linear).symmetric
    return int(symmetric and bool(context.rounding.get(linear.name, {}).get("narrow", False)))


def _row(
    linear: Linear, q: QTensor, rounded: Rounded | None, damping: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"linear": linear.name, "bits": q.spec.bits}
    if rounded is None or damping is None:
        return {**row, "error": None, "error_of": "weight"}
    return {
        **row,
        "error": rounded.error,
        "error_of": "output",
        "nearest_error": rounded.nearest,
        "rows": linear.out_features,
        "rows_kept_nearest": rounded.kept,
        "damping": damping,
    }
