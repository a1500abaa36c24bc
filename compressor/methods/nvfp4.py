"""NVFP4: 4-bit floats with a scale per 16 inputs and one for the whole matrix; Four Over Six
(arXiv 2512.02010) lets each block put its largest value on 4 where that loses less than 6.

Values saturate at 6 and scales at 448, as in hardware. The published Four Over Six code overflows
instead where a block's scale is subnormal, and turns its largest value into zero.
"""

from collections.abc import Iterator
from typing import Any, Literal

from compressor_calibration.stats import StatNeeds
from pydantic import Field
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import NVFP4, QTensor
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.rounding import round_to_nearest
from compressor.methods.common.shapes import unblocked
from compressor.numerics.nvfp4 import BLOCK, Rule

INPUTS = {
    "none": None,
    "calibrated": ActivationSpec("fp4_e2m1", "local", BLOCK),
    "dynamic": ActivationSpec("fp4_e2m1", "tensor", BLOCK),
}


class Nvfp4(Pass):
    """Round weights, and inputs where asked, to NVFP4, with Four Over Six block scales."""

    rule: Rule = Field(
        "mse",
        description="static_6 puts a block's largest value on 6, as plain NVFP4, static_4 on 4; "
        "mse, mae and abs_max choose for each block whichever makes less squared, absolute or "
        "largest error (Four Over Six)",
    )
    block: Literal["1x16", "16x16"] = Field(
        "1x16", description="what shares a scale; 16x16 gives the transposed weight the same codes"
    )
    activations: Literal["none", "calibrated", "dynamic"] = Field(
        "none",
        description="none: inputs stay as they are (NVFP4A16); calibrated: NVFP4 inputs with a "
        "global scale from calibration; dynamic: with that of each row of tokens",
    )

    def effects(self) -> Effects:
        tile_rows = 1 if self.block == "1x16" else BLOCK
        return Effects(
            scheme=Scheme(weight=NVFP4, input=INPUTS[self.activations]),
            rounding={"rule": self.rule, "tile_rows": tile_rows},
        )

    def needs(self) -> Needs:
        return Needs(stats=StatNeeds(absmax=self.activations == "calibrated"))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        return unblocked(context.selected, BLOCK, what="blocks")

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        return round_to_nearest(unit, context, about=_saturated)


def _saturated(weight: Tensor, q: QTensor) -> dict[str, Any]:
    """How many values would round beyond 6 on their scale: those the published code loses."""
    scales = q.scales.float().repeat_interleave(BLOCK, dim=1)
    scales = scales if q.second is None else scales * q.second
    count = int((weight.float().abs() >= 7 * scales).logical_and(scales > 0).sum())
    note = "values saturate at 6 (their scale is subnormal)"
    return {"note": note, "noted": count} if count else {}
