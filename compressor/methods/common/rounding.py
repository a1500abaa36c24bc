"""How a pass rounds linears and their inputs as the plan wants them: options of the quantizer that
is to come, scales that fused linears share, static scales of inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from compressor_calibration.stats import SiteStats
from torch import Tensor

from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor
from compressor.ir.scheme import ActivationSpec
from compressor.ir.unit import Unit
from compressor.methods.common.context import PassContext, PassResult
from compressor.numerics import fake_quantize, quantize, shared_options
from compressor.numerics.activations import fake_quantize_activation, stored_scale
from compressor.numerics.gram import output_error
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
    narrow = [unit.narrow_weight(linear) for linear in linears]
    options = options_of(context, linears, narrow)

    def rounded(number: int) -> tuple[QTensor, Mapping[str, Any]]:
        linear = linears[number]
        weight = unit.weight(linear)
        q = quantize(weight, context.spec(linear), **options[number])
        stale = divided is not None and linear.site in divided
        stats = None if stale else context.stats.get(linear.site)
        return q, {**weight_row(linear, weight, q, stats=stats), **about(weight, q)}

    made = context.ranks.each(range(len(linears)), rounded, lambda i: narrow[i].numel())
    for linear, (q, _) in zip(linears, made, strict=True):
        unit = unit.with_quantized(linear, q)
    return PassResult(unit, [row for _, row in made])


def weight_row(
    linear: Linear, weight: Tensor, q: QTensor, *, stats: SiteStats | None
) -> Mapping[str, Any]:
    """A report row: the relative squared error of the output, or where the site's Gram matrix was
    not collected, of the weight."""
    known = stats is not None and stats.needs.gram and stats.tokens > 0
    gram = stats.gram if stats is not None and known else None
    return {
        "linear": linear.name,
        "bits": q.spec.bits,
        "error": output_error(weight, q.dequantize(), gram),
        "error_of": "output" if known else "weight",
    }
