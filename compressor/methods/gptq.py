"""GPTQ (arXiv 2210.17323): weights rounded one input after another, each correcting the error of
those before it.

Groups are static: inputs are worked on in the order of their size, but nothing is reordered in what
is written, and no g_idx is needed. The grid is a searched one, or that of rounding to nearest; its
scales stay, unless they are refitted to the codes. A row whose output error does not come out below
that of rounding to nearest keeps the nearest codes.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, NamedTuple

from compressor_calibration.stats import StatNeeds
from pydantic import Field

from compressor.ir.unit import Unit
from compressor.methods.base import Needs
from compressor.methods.common.context import PassContext, PassResult
from compressor.methods.common.on_grid import OnGrid
from compressor.methods.common.rounding import with_input_scales
from compressor.methods.common.second_order import GptqOptions, round_unit, searched


class Settings(NamedTuple):
    """What decides how closely codes follow the calibration text."""

    scales: Literal["range", "search"]
    damping: float
    correction: float


PUBLISHED = Settings("range", 0.01, 0.0)
GENERAL = Settings("search", 0.1, 0.5)
"""Better than the published ones on every kind of text that was measured, for weights alone."""


class Gptq(OnGrid):
    """Round weights so that each rounding error is corrected by the weights rounded after it."""

    version: ClassVar[int] = 3

    integers_alone: ClassVar[tuple[str, ...]] = (*OnGrid.integers_alone, "refits")

    scales: Literal["range", "search"] | None = Field(
        None,
        description="how groups get scales and zero points: range, so that the whole range fits; "
        "search, so that the error of the inputs, by their size, is least. null: search; beside "
        "quantized inputs range",
    )
    damping: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the Gram matrix's mean diagonal added to it. null: 0.1; beside "
        "quantized inputs 0.01",
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
    correction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of what earlier rounding did to a linear's inputs that its weights make "
        "good; above 0 the original model runs beside the quantized one. null: 0.5; 0 beside "
        "quantized inputs, and with propagate: original",
    )
    min_tokens: int = Field(
        64, ge=1, description="what fewer tokens went through (a rare expert) is rounded to nearest"
    )

    @property
    def in_use(self) -> Settings:
        """What holds where the recipe leaves it open."""
        found = GENERAL if self.activations is None else PUBLISHED
        given = {name: getattr(self, name) for name in Settings._fields}
        return found._replace(**{name: x for name, x in given.items() if x is not None})

    @property
    def fits_ranges(self) -> bool:
        return self.in_use.scales == "search"

    def needs(self) -> Needs:
        cross = self.in_use.correction > 0
        return Needs(stats=StatNeeds(gram=True, absmax=self.reads_absmax, cross=cross))

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        unit = with_input_scales(unit, context.coded, context)
        scales, damping, correction = self.in_use
        options = GptqOptions(
            damping=damping,
            act_order=self.act_order,
            min_tokens=self.min_tokens,
            descent=self.descent,
            refits=self.refits,
            correction=correction,
        )
        start = None
        if scales == "search":
            start = partial(searched, context, self.min_tokens)
        return PassResult(*round_unit(unit, context, options, start=start))


PASS = Gptq
