"""The KV cache in fewer bits: keys (after the rotary embedding) and values are rounded as they are
stored. It changes no weight.

fp8 and int8 have static scales, absmax/448 and absmax/127 over the calibration tokens; int4 has a
scale and a zero for each token and head, made as the model runs (QoQ, arXiv 2405.04532), and
stores none.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal, Self

from compressor_calibration.stats import KVNeeds
from pydantic import Field, model_validator

from compressor.errors import InputError
from compressor.ir.scheme import KVSpec
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.numerics.activations import static_kv_scale


class KvCache(Pass):
    """Have keys and values of the whole model quantized in the cache."""

    version: ClassVar[int] = 2

    targets: str | list[str] = Field("attn.k", description="always all attention of the model")
    element: Literal["fp8", "int8", "int4"] = Field(
        "fp8",
        description="fp8 and int8: static scales from calibration; int4: a dynamic scale and zero "
        "for each token and head",
    )
    scales: Literal["tensor", "head"] = Field(
        "tensor", description="what shares a static scale: all keys of a layer, or those of a head"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.targets != "attn.k" or self.ignore != ["lm_head"]:
            raise ValueError("the cache has one form in the whole model: no targets, no ignore")
        if self.element == "int4" and self.altered("scales"):
            raise ValueError("int4 stores no scales: they are dynamic, per token and head")
        return self

    @property
    def spec(self) -> KVSpec:
        """How keys and values are stored."""
        if self.element == "int4":
            return KVSpec("int4", "token_head")
        return KVSpec("fp8_e4m3" if self.element == "fp8" else "int8", self.scales)

    def effects(self) -> Effects:
        return Effects(kv=self.spec)

    def needs(self) -> Needs:
        return Needs(kv=None if self.element == "int4" else KVNeeds())

    def check(self, context: PlanContext) -> Iterator[InputError]:
        shapes = [unit.attention for unit in context.layout.blocks if unit.attention is not None]
        if self.element != "int4" and any(shape.shared for shape in shapes):
            yield InputError(
                f"blocks of {context.layout.model_type} read the cache of other blocks, and there "
                "is no scale for what they read",
                hint="element: int4 has scales of its own for each token",
            )

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        if self.element == "int4" or unit.layout.attention is None:
            return PassResult(unit)
        path = unit.layout.attention_path
        scales = (
            static_kv_scale(context.keys_and_values.keys, self.spec),
            static_kv_scale(context.keys_and_values.values, self.spec),
        )
        made = replace(unit, kv_scales={**unit.kv_scales, path: scales})
        row = {
            "attention": path,
            "k_scale": scales[0].tolist(),
            "v_scale": scales[1].tolist(),
        }
        return PassResult(made, [row])
