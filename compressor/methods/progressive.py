"""QoQ's quantizer (arXiv 2405.04532): 4-bit weights that become int8 by integer arithmetic alone,
and int8 inputs with a scale per token, so that products run on the GPU's int8 units.

Per group there are two levels of scale: a float16 one per output channel over an int8 one per
group, chosen so that no int8 value overflows. Per channel there is one float16 scale and zero
point. Codes are GPTQ's, on ranges that may be shrunk first.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, Self

from compressor_calibration.stats import SiteStats, StatNeeds
from pydantic import Field, model_validator
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor, progressive
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.rounding import weight_row
from compressor.methods.common.second_order import GptqOptions, round_unit
from compressor.methods.common.shapes import undivided
from compressor.numerics import quantize
from compressor.numerics.range_search import search_ranges


class Progressive(Pass):
    """Round weights to 4 bits on two levels of scale, beside int8 inputs (QoQ's W4A8)."""

    version: ClassVar[int] = 2

    group_size: int | None = Field(
        128, ge=1, description="neighbouring inputs that share an int8 scale; null for whole rows"
    )
    zero: Literal["offset", "subtract"] = Field(
        "offset",
        description="zero points in units of the int8 value (as QServe's kernels have them), or of "
        "the code (as in the paper); per channel only offset",
    )
    clip: bool | None = Field(
        None,
        description="search how far ranges shrink before rounding; null: only without groups, as "
        "published",
    )
    clip_steps: int = Field(80, ge=1, le=1000, description="ratios that clipping tries, 1 to 0.2")
    gptq: bool = Field(True, description="correct each rounding error by the weights after it")
    damping: float = Field(0.01, gt=0, le=1, description="as in gptq")
    act_order: bool = Field(True, description="as in gptq")
    min_tokens: int = Field(64, ge=1, description="what fewer tokens went through has no data")

    @model_validator(mode="after")
    def _channels_have_one_form(self) -> Self:
        if self.group_size is None and self.zero == "subtract":
            raise ValueError("zero: subtract needs a group_size; per channel there is only offset")
        return self

    @property
    def clips(self) -> bool:
        return self.group_size is None if self.clip is None else self.clip

    def effects(self) -> Effects:
        weight = progressive(self.group_size, self.zero)
        return Effects(scheme=Scheme(weight=weight, input=ActivationSpec("int8", "token")))

    def needs(self) -> Needs:
        return Needs(stats=StatNeeds(gram=self.gptq or self.clips))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        return undivided(context.selected, self.group_size)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        def start(
            unit: Unit, linears: Sequence[Linear], stats: SiteStats | None
        ) -> Mapping[str, QTensor]:
            found = {}
            for linear in linears:
                weight, spec = unit.weight(linear), context.spec(linear)
                options: dict[str, Tensor] = {}
                if self.clips and stats is not None and stats.tokens >= self.min_tokens:
                    options = search_ranges(weight, stats.gram, spec, steps=self.clip_steps)
                found[linear.name] = quantize(weight, spec, **options)
            return found

        if self.gptq:
            options = GptqOptions(self.damping, self.act_order, self.min_tokens)
            return PassResult(*round_unit(unit, context, options, start=start))
        rows = {}
        made = unit
        for site in reversed(unit.layout.sites):
            linears = [x for x in context.coded if x.site == site]
            stats = context.stats.get(site) if linears else None
            for linear, q in zip(linears, start(unit, linears, stats).values(), strict=True):
                rows[linear.name] = weight_row(linear, unit.weight(linear), q, stats=stats)
                made = made.with_quantized(linear, q)
        return PassResult(made, [rows[x.name] for x in context.selected if x.name in rows])
