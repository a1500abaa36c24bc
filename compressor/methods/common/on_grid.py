"""Grids that methods which choose codes can round to, as recipes have them."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from compressor.errors import InputError
from compressor.ir.qtensor import MXFP4, NVFP4
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.methods.base import Effects, Pass
from compressor.methods.common import integers
from compressor.methods.common.context import PlanContext
from compressor.methods.common.shapes import undivided
from compressor.numerics import mx, nvfp4

Grid = Literal["int", "nvfp4", "mxfp4"]

INPUTS: dict[str, dict[str | None, ActivationSpec | None]] = {
    "int": {None: None, **{m: integers.input_spec(m) for m in get_args(integers.Inputs)}},
    "nvfp4": {
        None: None,
        "calibrated": ActivationSpec("fp4_e2m1", "local", nvfp4.BLOCK),
        "dynamic": ActivationSpec("fp4_e2m1", "tensor", nvfp4.BLOCK),
    },
    "mxfp4": {None: None, "dynamic": ActivationSpec("fp4_e2m1", "mx", mx.BLOCK)},
}
FLOATS = {"nvfp4": (NVFP4, nvfp4.BLOCK), "mxfp4": (MXFP4, mx.BLOCK)}


class OnGrid(Pass):
    """A pass that rounds to integers, NVFP4 or MXFP4, with quantized inputs where asked."""

    integers_alone: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric")
    """Parameters that say nothing of other grids."""

    grid: Grid = Field(
        "int",
        description="int: integers of `bits`; nvfp4, mxfp4: 4-bit floats, nvfp4 with the scales "
        "of `rule`",
    )
    bits: int = Field(4, ge=2, le=8, description="bits of one integer weight")
    group_size: int | None = Field(
        128,
        ge=1,
        description="neighbouring inputs that share a scale; null for a whole row, the default "
        "of 8 bits beside int8 inputs",
    )
    symmetric: bool = Field(True, description="grids centred on zero; false stores zero points")
    rule: nvfp4.Rule = Field("mse", description="how NVFP4 chooses a block's scale, as in nvfp4")
    activations: integers.Inputs | Literal["calibrated", "dynamic"] | None = Field(
        None,
        description="quantized inputs: int8 with a scale per token, tensor or a static one; fp8: "
        "FP8 with one per token; beside nvfp4 NVFP4 inputs with a calibrated or dynamic global "
        "scale; beside mxfp4 dynamic ones",
    )

    _by_channel = model_validator(mode="before")(integers.by_channel_beside_inputs)

    @model_validator(mode="after")
    def _options_of_the_grid(self) -> Self:
        given = [] if self.grid == "int" else self.altered(*self.integers_alone)
        given += [] if self.grid == "nvfp4" else self.altered("rule")
        if given:
            raise ValueError(f"{' and '.join(given)} says nothing with grid: {self.grid}")
        if self.activations not in INPUTS[self.grid]:
            known = ", ".join(str(mode) for mode in INPUTS[self.grid] if mode)
            raise ValueError(f"activations with grid: {self.grid} are null, {known}")
        return self

    @property
    def reads_absmax(self) -> bool:
        """Whether the scale of its targets' inputs is calibrated."""
        return self.activations in ("static", "calibrated")

    @property
    def fits_ranges(self) -> bool:
        """Whether how far ranges are clipped is searched or learned."""
        return True

    def effects(self) -> Effects:
        inputs = INPUTS[self.grid][self.activations]
        if self.grid == "int":
            weight = integers.int_spec(self.bits, self.group_size, symmetric=self.symmetric)
            rounding = integers.narrow_beside_inputs(self.bits, self.activations)
        else:
            weight = FLOATS[self.grid][0]
            rounding = {"rule": self.rule if self.grid == "nvfp4" else "mse"}
        return Effects(
            scheme=Scheme(weight=weight, input=inputs),
            rounding=rounding,
            fits_ranges=self.fits_ranges,
        )

    def check(self, context: PlanContext) -> Iterator[InputError]:
        size = self.group_size if self.grid == "int" else FLOATS[self.grid][1]
        return undivided(context.selected, size)
