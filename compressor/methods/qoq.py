"""QoQ (arXiv 2405.04532): W4A8KV4, 4-bit weights and 4-bit keys and values beside int8 inputs.

It is a sequence of passes, each of which can stand in a recipe by itself:
    rotate            the residual stream and the channels of heads: no channel is an outlier
    reorder           inner channels by their salience (only where weights have groups)
    smoothquant       what enters down projections, gently: the rows of the up projection take it
    smooth_attention  keys, whose outlier channels the queries take
    progressive       weights to 4 bits by GPTQ, inputs to int8
    kv_cache          keys and values to 4 bits, per token and head
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from compressor.methods.base import Method

DOWN_ALPHA = {True: 0.3, False: 0.1}
"""Published for models without a value of their own: with groups, and per channel."""


class Qoq(Method):
    """W4A8KV4: rotate, reorder, smooth, then 4-bit weights, int8 inputs and a 4-bit KV cache.

    Stands for the passes rotate, reorder, smoothquant (down projections only), smooth_attention,
    progressive and kv_cache, in this order.
    """

    group_size: int | None = Field(
        128, ge=1, description="neighbouring inputs that share an int8 scale; null for whole rows"
    )
    zero: Literal["offset", "subtract"] = Field("offset", description="as in progressive")
    rotate: bool = Field(True, description="rotate the residual stream")
    seed: int | None = Field(None, ge=0, description="random signs of the rotation, as in rotate")
    keep_mean: bool = Field(False, description="as in rotate: for models with LayerNorms")
    reorder: bool | None = Field(
        None, description="sort inner channels by salience; null: only with groups, as published"
    )
    down_alpha: float | Literal["published"] | None = Field(
        "published",
        description="how much of the outliers before down projections their weights take; null "
        "leaves them. Published: 0.3 with groups, 0.1 without, and other values for some models",
    )
    attention_alpha: float | Literal["search"] | None = Field(
        0.5,
        description="as alpha of smooth_attention, search included; null leaves keys as they are",
    )
    clip: bool | None = Field(None, description="as in progressive")
    gptq: bool = Field(True, description="as in progressive")
    damping: float = Field(0.01, gt=0, le=1, description="as in gptq")
    min_tokens: int = Field(64, ge=1, description="as in gptq")
    kv_cache: bool = Field(True, description="keys and values in 4 bits")

    @model_validator(mode="after")
    def _channels_have_one_form(self) -> Self:
        if self.group_size is None and self.zero == "subtract":
            raise ValueError("zero: subtract needs a group_size; per channel there is only offset")
        if isinstance(self.down_alpha, float) and not 0 <= self.down_alpha <= 1:
            raise ValueError("down_alpha is a number from 0 to 1, published or null")
        if isinstance(self.attention_alpha, float) and not 0 <= self.attention_alpha <= 1:
            raise ValueError("attention_alpha is a number from 0 to 1, search or null")
        if self.attention_alpha == "search" and not self.kv_cache:
            raise ValueError("attention_alpha: search needs kv_cache, which says how keys round")
        return self

    def stands_for(self) -> Sequence[tuple[str, dict[str, Any]]]:
        grouped = self.group_size is not None
        found: list[tuple[str, dict[str, Any]]] = []
        if self.rotate:
            found.append(("rotate", {"seed": self.seed, "keep_mean": self.keep_mean}))
        if grouped if self.reorder is None else self.reorder:
            found.append(("reorder", {}))
        if self.down_alpha is not None:
            published = self.down_alpha == "published"
            alpha = DOWN_ALPHA[grouped] if published else self.down_alpha
            found.append(("smoothquant", {"targets": "*.down", "fold_up": True, "alpha": alpha}))
        if self.attention_alpha is not None:
            found.append(("smooth_attention", {"alpha": self.attention_alpha}))
        own = {"targets", "ignore", "group_size", "zero", "clip", "gptq", "damping", "min_tokens"}
        found.append(("progressive", self.model_dump(include=own)))
        if self.kv_cache:
            found.append(("kv_cache", {"element": "int4"}))
        return found
