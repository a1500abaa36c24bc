"""GPTQ (arXiv 2210.17323): weights rounded one input after another, each correcting the error of
those before it.

Groups are static: inputs are worked on in the order of their size, but nothing is reordered in what
is written, and no g_idx is needed. The grid is a searched one, or that of rounding to nearest; its
scales stay, unless they are refitted to the codes. A row whose output error does not come out below
that of rounding to nearest keeps the nearest codes.
"""

from typing import ClassVar, Literal

from compressor_calibration.stats import StatNeeds
from pydantic import Field

from compressor.ir.unit import Unit
from compressor.methods.base import Needs
from compressor.methods.common.context import PassContext, PassResult
from compressor.methods.common.on_grid import OnGrid
from compressor.methods.common.rounding import with_input_scales
from compressor.methods.common.second_order import GptqOptions, round_unit


class Gptq(OnGrid):
    """Round weights so that each rounding error is corrected by the weights rounded after it."""

    version: ClassVar[int] = 7

    integers_alone: ClassVar[tuple[str, ...]] = (*OnGrid.integers_alone, "refits")

    scales: Literal["range", "search"] = Field(
        "search",
        description="how groups get scales and zero points: range, so that the whole range fits; "
        "search, so that the error of the inputs, by their size, is least",
    )
    damping: float = Field(
        0.1, gt=0, le=1, description="share of the Gram matrix's mean diagonal added to it"
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
        0.5,
        ge=0,
        le=1,
        description="share of what earlier rounding did to a linear's inputs that its weights make "
        "good; above 0 the original model runs beside the quantized one; with propagate: original "
        "there is nothing to correct",
    )
    min_tokens: int = Field(
        64, ge=1, description="what fewer tokens went through (a rare expert) is rounded to nearest"
    )

    @property
    def fits_ranges(self) -> bool:
        return self.scales == "search"

    def needs(self) -> Needs:
        cross = self.correction > 0
        return Needs(stats=StatNeeds(gram=True, absmax=self.reads_absmax, cross=cross))

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        unit = with_input_scales(unit, context.coded, context)
        options = GptqOptions(**{name: getattr(self, name) for name in GptqOptions._fields})
        search = self.scales == "search"
        return PassResult(*round_unit(unit, context, options, search=search))
