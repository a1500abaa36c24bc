"""GPTQ (arXiv 2210.17323): weights rounded one input after another, each correcting the error of
those before it.

Groups are static: inputs are worked on in the order of their size, but nothing is reordered in what
is written, and no g_idx is needed. The grid is that of rounding to nearest, or a searched one; its
scales stay, unless they are refitted to the codes. A row whose output error does not come out below
that of rounding to nearest keeps the nearest codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

from compressor_calibration.stats import StatNeeds
from pydantic import Field, model_validator

from compressor.errors import InputError
from compressor.ir.qtensor import NVFP4
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common import integers
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.rounding import with_input_scales
from compressor.methods.common.second_order import GptqOptions, round_unit, searched
from compressor.methods.common.shapes import undivided
from compressor.numerics.nvfp4 import BLOCK, Rule

INTEGERS = ("bits", "group_size", "symmetric", "scales", "refits")
INPUTS: dict[str, dict[str | None, ActivationSpec | None]] = {
    "int": {None: None, **{m: integers.input_spec(m) for m in ("token", "tensor", "static")}},
    "nvfp4": {
        None: None,
        "calibrated": ActivationSpec("fp4_e2m1", "local", BLOCK),
        "dynamic": ActivationSpec("fp4_e2m1", "tensor", BLOCK),
    },
}


class Gptq(Pass):
    """Round weights so that each rounding error is corrected by the weights rounded after it."""

    version: ClassVar[int] = 2

    grid: Literal["int", "nvfp4"] = Field(
        "int", description="int: integers of `bits`; nvfp4: 4-bit floats with the scales of `rule`"
    )
    bits: int = Field(4, ge=2, le=8, description="bits of one integer weight")
    group_size: int | None = Field(
        128,
        ge=1,
        description="neighbouring inputs that share a scale; null for a whole row, the default "
        "of 8 bits beside int8 inputs",
    )
    symmetric: bool = Field(True, description="grids centred on zero; false stores zero points")
    rule: Rule = Field("mse", description="how NVFP4 chooses a block's scale, as in nvfp4")
    activations: Literal["token", "tensor", "static", "calibrated", "dynamic"] | None = Field(
        None,
        description="quantized inputs: int8 with a scale per token, tensor or a static one; beside "
        "nvfp4 NVFP4 inputs with a calibrated or dynamic global scale",
    )
    scales: Literal["range", "search"] = Field(
        "range",
        description="how integers get scales and zero points: range, so that the whole range of a "
        "group fits; search, so that the error of its inputs, by their size, is least",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="share of the Gram matrix's mean diagonal added to it"
    )
    act_order: bool = Field(
        True, description="round the inputs with the largest values first; changes no layout"
    )
    descent: int = Field(
        0, ge=0, le=100, description="sweeps that improve one input's codes after another"
    )
    refits: int = Field(
        0,
        ge=0,
        le=100,
        description="times that scales are refitted to the codes; `descent` follows each",
    )
    correction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of what earlier rounding did to a linear's inputs that its weights make "
        "good; above 0 the original model runs beside the quantized one",
    )
    min_tokens: int = Field(
        64, ge=1, description="what fewer tokens went through (a rare expert) is rounded to nearest"
    )

    _by_channel = model_validator(mode="before")(integers.by_channel_beside_inputs)

    @model_validator(mode="after")
    def _options_of_the_grid(self) -> Gptq:
        given = self.altered(*(INTEGERS if self.grid == "nvfp4" else ("rule",)))
        if given:
            raise ValueError(f"{' and '.join(given)} says nothing with grid: {self.grid}")
        if self.activations not in INPUTS[self.grid]:
            known = ", ".join(str(mode) for mode in INPUTS[self.grid] if mode)
            raise ValueError(f"activations with grid: {self.grid} are null, {known}")
        return self

    def effects(self) -> Effects:
        weight = NVFP4
        rounding: dict[str, Any] = {"rule": self.rule}
        if self.grid == "int":
            weight = integers.int_spec(self.bits, self.group_size, symmetric=self.symmetric)
            rounding = integers.narrow_beside_inputs(self.bits, self.activations)
        inputs = INPUTS[self.grid][self.activations]
        return Effects(scheme=Scheme(weight=weight, input=inputs), rounding=rounding)

    def needs(self) -> Needs:
        absmax = self.activations in ("static", "calibrated")
        return Needs(stats=StatNeeds(gram=True, absmax=absmax, cross=self.correction > 0))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        size = BLOCK if self.grid == "nvfp4" else self.group_size
        return undivided(context.selected, size)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        unit = with_input_scales(unit, context.coded, context)
        options = GptqOptions(
            damping=self.damping,
            act_order=self.act_order,
            min_tokens=self.min_tokens,
            descent=self.descent,
            refits=self.refits,
            correction=self.correction,
        )
        start = None
        if self.scales == "search":
            start = partial(searched, context, self.min_tokens)
        return PassResult(*round_unit(unit, context, options, start=start))


PASS = Gptq
