"""FP8 (E4M3) weights and inputs: eight bits with an exponent of their own, so that a scale only has
to keep the largest value below 448.

Formats and their recipes: static scales (arXiv 2209.05433), dynamic ones per token, and the
128 × 128 blocks of DeepSeek-V3 (arXiv 2412.19437).
"""

from collections.abc import Iterator
from typing import Literal

from compressor_calibration.stats import StatNeeds
from pydantic import Field

from compressor.errors import InputError
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.rounding import round_to_nearest
from compressor.methods.common.shapes import unblocked

BLOCK = 128

SCALES: dict[str, tuple[QuantSpec, ActivationSpec | None]] = {
    "dynamic": (QuantSpec("fp8_e4m3", 8, "channel"), ActivationSpec("fp8_e4m3", "token")),
    "static": (QuantSpec("fp8_e4m3", 8, "tensor"), ActivationSpec("fp8_e4m3", "static")),
    "block": (
        QuantSpec("fp8_e4m3", 8, "block", block=(BLOCK, BLOCK)),
        ActivationSpec("fp8_e4m3", "group", BLOCK),
    ),
    "weights": (QuantSpec("fp8_e4m3", 8, "channel"), None),
}


class Fp8(Pass):
    """Round weights and inputs to 8-bit floats (E4M3)."""

    scales: Literal["dynamic", "static", "block", "weights"] = Field(
        "dynamic",
        description="dynamic: weights per channel, inputs per token as the model runs; static: one "
        "scale per weight and a calibrated one per input; block: weights in tiles of 128 x 128, "
        "inputs per 128 channels of a token; weights: per channel, inputs stay as they are",
    )

    def effects(self) -> Effects:
        return Effects(scheme=Scheme(*SCALES[self.scales]))

    def needs(self) -> Needs:
        return Needs(stats=StatNeeds(absmax=self.scales == "static"))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        size = BLOCK if self.scales == "block" else 1
        return unblocked(context.selected, size, hint="; scales: dynamic would do")

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        return round_to_nearest(unit, context)
