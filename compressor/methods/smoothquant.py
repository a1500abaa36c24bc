"""SmoothQuant (arXiv 2211.10438): outliers of inputs are moved into the weights that read them.

A channel of a linear's input is divided by a scale, which the norm before it takes, and the
weight's column multiplied by it. So the model computes the same function, and both the input and
the weight have ranges that 8-bit integers can hold.
"""

from typing import Any, Literal, Self

import torch
from compressor_calibration.stats import StatNeeds
from pydantic import Field, model_validator
from torch import Tensor

from compressor.ir.layout import Fold
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult
from compressor.methods.common.integers import input_spec, int_spec
from compressor.methods.common.rounding import enter_of, quantizer_of, round_to_nearest
from compressor.numerics.folding import fold_changes
from compressor.numerics.migration import (
    ALPHAS,
    DEFAULT_ALPHA,
    Migration,
    search_scales_with_inputs,
    smooth_scales,
)


class Smoothquant(Pass):
    """Move activation outliers into the weights, then, with `bits`, quantize both to int8.

    Without `bits` it only changes weights, and a quantizer with `activations` comes after it.
    """

    alpha: float | Literal["family", "search"] = Field(
        "family",
        description="how much of an outlier the weight takes, 0 to 1; family: as published for the "
        "model's family (0.5 where nothing is); search: for each input, the one with the least "
        "output error under the quantizers of weight and input",
    )
    fold_up: bool = Field(
        False, description="also rescale what enters down projections, by the rows of the up one"
    )
    grid: int = Field(20, ge=1, le=1000, description="steps from 0 to 1 that alpha: search tries")
    search_tokens: int = Field(512, ge=1, description="input vectors that alpha: search runs")
    bits: Literal[8] | None = Field(
        None, description="8 quantizes weights and inputs; null leaves that to a later pass"
    )
    weights: Literal["channel", "tensor"] = Field(
        "channel", description="what shares a scale: an output channel, or the tensor (O1 to O3)"
    )
    activations: Literal["token", "tensor", "static"] = Field(
        "token",
        description="dynamic scale per token (O1), dynamic per tensor (O2), or one calibrated "
        "scale (O3)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.altered("weights", "activations")
        if self.bits is None and given:
            names = " and ".join(given)
            raise ValueError(f"{names} without bits; give them to the quantizer that comes later")
        if isinstance(self.alpha, float) and not 0 <= self.alpha <= 1:
            raise ValueError("alpha is a number from 0 to 1, 'family' or 'search'")
        return self

    def effects(self) -> Effects:
        if self.bits is None:
            return Effects(rescales=True)
        weight = int_spec(8, None, symmetric=True)
        if self.weights == "tensor":
            weight = QuantSpec("int", 8, "tensor")
        # As published: the codes −127 … 127 on absmax/127, which every int8 kernel takes.
        return Effects(
            scheme=Scheme(weight=weight, input=input_spec(self.activations)),
            rounding={"narrow": True},
            rescales=True,
        )

    def needs(self) -> Needs:
        search = self.alpha == "search"
        stats = StatNeeds(absmax=True, keep_inputs=self.search_tokens if search else 0)
        return Needs(stats=stats, rounding=search and self.bits is None)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        folds = {f.site: f for f in unit.layout.folds if self._smooths(f, unit, context)}
        divided: dict[str, Tensor] = {}
        exponents: dict[str, float | None] = {}
        # Outputs before inputs: rows of `up` are divided before its columns are looked at.
        for site in reversed(unit.layout.sites):
            if site not in folds:
                continue
            found = self._migrate(folds[site], unit, context)
            changes = fold_changes(unit.tensors, folds[site], unit.layout, found.scales)
            unit = unit.with_changes(changes)
            divided[site], exponents[site] = found.scales, found.ratio
        rows: dict[str, dict[str, Any]] = {
            x.name: {
                "linear": x.name,
                "alpha": exponents.get(x.site),
                "rescaled": x.site in divided,
            }
            for x in context.selected
        }
        if self.bits is not None:
            made = round_to_nearest(unit, context, divided=divided)
            unit = made.unit
            for row in made.rows:
                rows[row["linear"]] |= row
        return PassResult(unit, list(rows.values()))

    def _smooths(self, site_fold: Fold, unit: Unit, context: PassContext) -> bool:
        """Whether a site is rescaled: something selected reads it, calibration reached it, and all
        that takes the scale is still in float."""
        readers = unit.layout.site_linears(site_fold.site)
        if not any(linear in context.selected for linear in readers):
            return False
        if site_fold.kind == "linear":
            down = all(linear.role.endswith(".down") for linear in readers)
            if not (self.fold_up and down):
                return False
        floats = [site_fold.source, *(linear.name for linear in readers)]
        return (
            all(unit.has_weight(name) for name in floats)
            and context.stats[site_fold.site].tokens > 0
        )

    def _migrate(self, site_fold: Fold, unit: Unit, context: PassContext) -> Migration:
        stats = context.stats[site_fold.site]
        readers = unit.layout.site_linears(site_fold.site)
        weights = [unit.weight(linear) for linear in readers]
        if self.alpha != "search":
            alpha = self.alpha
            if alpha == "family":
                alpha = ALPHAS.get(context.model_type, DEFAULT_ALPHA)
            return Migration(smooth_scales(stats.absmax, weights, alpha), alpha, ())
        judged = [x for x in readers if x in context.coded]
        ratios = [i / self.grid for i in range(self.grid + 1)]
        return search_scales_with_inputs(
            [unit.weight(linear) for linear in judged],
            stats.inputs,
            torch.stack([smooth_scales(stats.absmax, weights, ratio) for ratio in ratios]),
            ratios,
            quantizer=quantizer_of(context, judged),
            enter=enter_of(context.schemes[judged[0].name].input, stats.absmax),
        )
