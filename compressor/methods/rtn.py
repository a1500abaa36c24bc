"""Round-to-nearest: integer weights without calibration, and int8 or FP8 inputs where asked."""

from collections.abc import Iterator
from typing import ClassVar

from compressor_calibration.stats import StatNeeds
from pydantic import Field, model_validator

from compressor.errors import InputError
from compressor.ir.scheme import Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common import integers
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.rounding import round_to_nearest
from compressor.methods.common.shapes import undivided


class Rtn(Pass):
    """Round every weight to the nearest value of its group's grid, without calibration data."""

    version: ClassVar[int] = 3

    bits: int = Field(4, ge=2, le=8, description="bits of one weight")
    group_size: int | None = Field(
        128,
        ge=1,
        description="neighbouring inputs that share a scale; null for a whole row, the default "
        "of 8 bits beside int8 inputs",
    )
    symmetric: bool = Field(True, description="grids centred on zero; false stores zero points")
    activations: integers.Inputs | None = Field(
        None,
        description="int8 inputs: with a dynamic scale per token or tensor, or a calibrated one; "
        "fp8: FP8 inputs with a dynamic scale per token",
    )

    _by_channel = model_validator(mode="before")(integers.by_channel_beside_inputs)

    def effects(self) -> Effects:
        weight = integers.int_spec(self.bits, self.group_size, symmetric=self.symmetric)
        return Effects(
            scheme=Scheme(weight=weight, input=integers.input_spec(self.activations)),
            rounding=integers.narrow_beside_inputs(self.bits, self.activations),
        )

    def needs(self) -> Needs:
        return Needs(stats=StatNeeds(absmax=self.activations == "static"))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        return undivided(context.selected, self.group_size)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        return round_to_nearest(unit, context)
