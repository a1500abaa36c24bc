"""MXFP4 (OCP Microscaling Formats 1.0): 4-bit floats with a power of two per 32 inputs, 4.25 bits
per weight; what gpt-oss ships, and what needs no global scale and no calibration."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from compressor.errors import InputError
from compressor.ir.qtensor import MXFP4, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.rounding import round_to_nearest
from compressor.methods.common.shapes import unblocked
from compressor.numerics.mx import BLOCK, Rule


class Mxfp4(Pass):
    """Round weights, and inputs where asked, to MXFP4."""

    spec: ClassVar[QuantSpec] = MXFP4

    rule: Rule = Field(
        "mse",
        description="the power of two of a group: floor as the OCP's specification has it, where "
        "the largest value may saturate; ceil, where none does (ModelOpt); nearest, "
        "compressed-tensors' mixture; mse, floor or ceil by the smaller squared error",
    )
    activations: Literal["none", "dynamic"] = Field(
        "none",
        description="none: inputs stay as they are; dynamic: inputs are rounded to the same form "
        "as the model runs",
    )

    def effects(self) -> Effects:
        inputs = ActivationSpec("fp4_e2m1" if self.spec.bits == 4 else "fp8_e4m3", "mx", BLOCK)
        return Effects(
            scheme=Scheme(self.spec, None if self.activations == "none" else inputs),
            rounding={"rule": self.rule},
        )

    def check(self, context: PlanContext) -> Iterator[InputError]:
        return unblocked(context.selected, BLOCK)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        return round_to_nearest(unit, context)
