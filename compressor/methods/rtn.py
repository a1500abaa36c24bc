"""Round-to-nearest: integer weights without calibration, and int8 inputs where asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from compressor_calibration.stats import SiteStats, StatNeeds
from pydantic import Field, model_validator
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.rounding import quantize_all, with_input_scales
from compressor.methods.common.shapes import undivided
from compressor.numerics.gram import output_error


def by_channel_beside_inputs(data: Any) -> Any:
    """Eight-bit weights beside int8 inputs have a scale per output channel unless a group is asked
    for: no runtime multiplies them in groups."""
    if isinstance(data, dict) and data.get("bits") == 8 and data.get("activations") is not None:
        return {"group_size": None, **data}
    return data


class Rtn(Pass):
    """Round every weight to the nearest value of its group's grid, without calibration data."""

    version: ClassVar[int] = 2

    bits: int = Field(4, ge=2, le=8, description="bits of one weight")
    group_size: int | None = Field(
        128,
        ge=1,
        description="neighbouring inputs that share a scale; null for a whole row, the default "
        "of 8 bits beside int8 inputs",
    )
    symmetric: bool = Field(True, description="grids centred on zero; false stores zero points")
    activations: Literal["token", "tensor", "static"] | None = Field(
        None,
        description="int8 inputs: with a dynamic scale per token or tensor, or a calibrated one",
    )

    _by_channel = model_validator(mode="before")(by_channel_beside_inputs)

    def effects(self) -> Effects:
        weight = int_spec(self.bits, self.group_size, symmetric=self.symmetric)
        return Effects(
            scheme=Scheme(weight=weight, input=input_spec(self.activations)),
            rounding=narrow_beside_inputs(self.bits, self.activations),
        )

    def needs(self) -> Needs:
        return Needs(stats=StatNeeds(absmax=self.activations == "static"))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        return undivided(context.selected, self.group_size)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        rows = []
        unit = with_input_scales(unit, context.coded, context)
        for linear in context.coded:
            weight = unit.weight(linear)
            (q,) = quantize_all(context, [linear], [weight])
            rows.append(weight_row(linear, weight, q, stats=context.stats.get(linear.site)))
            unit = unit.with_quantized(linear, q)
        return PassResult(unit, rows)


def int_spec(bits: int, group_size: int | None, *, symmetric: bool) -> QuantSpec:
    """Integer weights with a scale per group, or per output channel where there is no group."""
    return QuantSpec(
        element="int",
        bits=bits,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        zero="none" if symmetric else "subtract",
    )


def input_spec(mode: Literal["token", "tensor", "static"] | None) -> ActivationSpec | None:
    """int8 inputs, or float ones."""
    return None if mode is None else ActivationSpec("int8", mode)


def narrow_beside_inputs(bits: int, activations: str | None) -> dict[str, Any]:
    """Options of the rounding: eight-bit symmetric weights that are multiplied with int8 inputs
    have the codes −127 … 127 on a positive scale, which every int8 kernel takes."""
    return {"narrow": True} if bits == 8 and activations is not None else {}


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


PASS = Rtn
