"""How a pass rounds linears and their inputs as the plan wants them: options of the quantizer that
is to come, scales that fused linears share, static scales of inputs."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from compressor_calibration.stats import SiteStats
from torch import Tensor

from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor
from compressor.ir.same_shape import Linears, of_one_shape, stacked
from compressor.ir.scheme import ActivationSpec
from compressor.ir.unit import Unit
from compressor.methods.common.context import PassContext, PassResult
from compressor.numerics import fake_quantize, quantize, shared_options
from compressor.numerics.activations import fake_quantize_activation, stored_scale
from compressor.numerics.gram import error_of_parts, output_error
from compressor.numerics.int_affine import is_plain_int
from compressor.numerics.migration import Quantizer


def fused_with(linear: Linear) -> Hashable:
    """Equal for linears that a runtime makes one matrix of: q/k/v, gate and up (of one expert)."""
    return (linear.fused, linear.expert, linear.site) if linear.fused else None


def options_of(
    context: PassContext, linears: Sequence[Linear], weights: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Options of `quantize` for each linear [out, in]: those of its quantizer, and the absmax of
    all that it is fused with where that decides a scale."""
    specs = [context.spec(linear) for linear in linears]
    shared = shared_options(weights, specs, [fused_with(linear) for linear in linears])
    return [
        {**context.rounding.get(linear.name, {}), **found}
        for linear, found in zip(linears, shared, strict=True)
    ]


def quantizer_of(context: PassContext, linears: Sequence[Linear]) -> Quantizer:
    """Weights of these linears [O_i, C] → what their quantized forms will stand for."""
    specs = [context.spec(linear) for linear in linears]

    def rounded(weights: Sequence[Tensor]) -> list[Tensor]:
        options = options_of(context, linears, weights)
        return [fake_quantize(w, s, **o) for w, s, o in zip(weights, specs, options, strict=True)]

    return rounded


def quantize_all(
    context: PassContext, linears: Sequence[Linear], weights: Sequence[Tensor]
) -> list[QTensor]:
    """Each linear's weight rounded to nearest."""
    options = options_of(context, linears, weights)
    return [
        quantize(weight, context.spec(linear), **option)
        for linear, weight, option in zip(linears, weights, options, strict=True)
    ]


def enter_of(
    spec: ActivationSpec | None, absmax: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x/s, s) → x/s as the linear will see it, for inputs [T, C] that were divided by s [C].

    absmax  [C] of the undivided input, for static and local scales
    """

    def enter(x: Tensor, scales: Tensor) -> Tensor:
        if spec is None:
            return x
        scale = None
        if spec.mode in ("static", "local"):
            if absmax is None:
                raise ValueError(f"a {spec.mode} scale follows from the input's absmax")
            scale = stored_scale(absmax / scales, spec)
        return fake_quantize_activation(x, spec, scale)

    return enter


def with_input_scales(
    unit: Unit,
    linears: Sequence[Linear],
    context: PassContext,
    *,
    divided: Mapping[str, Tensor] | None = None,
) -> Unit:
    """The unit with a calibrated scale for every linear whose input has a stored one.

    divided  site → what its input has been divided by since the statistics were taken, [C]
    An expert that calibration sent no token gets the largest scale that its role has elsewhere.
    """
    found: dict[str, Tensor] = {}
    missing: list[Linear] = []
    scaled = [
        (linear, spec)
        for linear in linears
        if (spec := context.schemes[linear.name].input) and spec.mode in ("static", "local")
    ]

    def scale_of(of: tuple[Linear, ActivationSpec]) -> Tensor:
        linear, spec = of
        absmax = context.stats[linear.site].absmax
        if divided is not None and linear.site in divided:
            absmax = absmax / divided[linear.site]
        return stored_scale(absmax, spec)

    scales = context.ranks.each(scaled, scale_of)
    for (linear, _), scale in zip(scaled, scales, strict=True):
        if bool(scale > 0) and bool(scale.isfinite()):
            found[linear.name] = scale
        else:
            missing.append(linear)
    for linear in missing:
        alike = [found[x.name] for x in linears if x.role == linear.role and x.name in found]
        found[linear.name] = torch.stack(alike).amax(0) if alike else torch.ones(1)
    for linear in linears:
        if linear.name in found:
            unit = unit.with_input_scale(linear, found[linear.name])
    return unit


def round_to_nearest(
    unit: Unit,
    context: PassContext,
    *,
    divided: Mapping[str, Tensor] | None = None,
    about: Callable[[Tensor, QTensor], Mapping[str, Any]] = lambda weight, q: {},
) -> PassResult:
    """The unit with every linear that gets codes rounded, with scales of their inputs where they
    are stored, and a row for each.

    divided  as in `with_input_scales`
    about    what else a row says of a weight and its codes
    """
    linears = context.coded
    unit = with_input_scales(unit, linears, context, divided=divided)
    fused: dict[Hashable, list[Linear]] = {}
    for linear in linears:
        fused.setdefault(fused_with(linear) or linear.name, []).append(linear)
    options: dict[str, dict[str, Any]] = {}
    for together in fused.values():  # of experts that wait elsewhere no others are brought here
        every = options_of(context, together, [unit.narrow_weight(x) for x in together])
        options |= {x.name: option for x, option in zip(together, every, strict=True)}
    seen = [x for x in linears if divided is None or x.site not in divided]
    informed = {x.name for x in seen if x.site in context.stats}

    def kind(linear: Linear) -> Hashable:
        spec, given = context.spec(linear), options[linear.name]
        by_row = is_plain_int(spec) and not given and linear.name not in informed
        return spec if by_row else linear.name

    def rounded(some: Linears) -> tuple[QTensor, list[Mapping[str, Any]]]:
        """Codes of linears of one shape, one above the other, and a row for each."""
        first = some[0]
        weights = stacked([unit.weight(linear) for linear in some])
        weight = weights.flatten(0, 1)
        q = quantize(weight, context.spec(first), **options[first.name])
        if len(some) == 1:
            stats = context.stats[first.site] if first.name in informed else None
            row = {**weight_row(first, weight, q, stats=stats), **about(weight, q)}
            return unit.where_it_waits(first, q), [row]
        errors = error_of_parts([(weights, q.dequantize().view(weights.shape))], None)
        parts = zip(some, weights, q.parts(len(some)), errors.tolist(), strict=True)
        told = [{**_row(x, y, error), **about(old, y)} for x, old, y, error in parts]
        return unit.where_it_waits(first, q), [*told]

    stacks = of_one_shape(linears, kind)
    made = context.ranks.each(stacks, rounded, lambda some: sum(math.prod(x.shape) for x in some))
    rows: dict[str, Mapping[str, Any]] = {}
    coded: list[tuple[Linear, QTensor]] = []
    for some, (q, found) in zip(stacks, made, strict=True):
        coded += zip(some, q.parts(len(some)), strict=True)
        rows |= {row["linear"]: row for row in found}
    return PassResult(unit.with_codes(coded), [rows[linear.name] for linear in linears])


def weight_row(
    linear: Linear, weight: Tensor, q: QTensor, *, stats: SiteStats | None
) -> Mapping[str, Any]:
    """A report row: the relative squared error of the output, or where the site's Gram matrix was
    not collected, of the weight."""
    known = stats is not None and stats.needs.gram and stats.tokens > 0
    gram = stats.gram if stats is not None and known else None
    row = _row(linear, q, output_error(weight, q.dequantize(), gram))
    return {**row, "error_of": "output" if known else "weight"}


def _row(linear: Linear, q: QTensor, error: float) -> dict[str, Any]:
    return {"linear": linear.name, "bits": q.spec.bits, "error": error, "error_of": "weight"}
