"""InfLLM's context memory (arXiv 2402.04617): texts past the trained length, without training.

A query sees a few first tokens, a window with true distances, and blocks of older tokens that its
piece of the text looked up, all of them at the window's far end. A block is found by the keys that
got most attention while it was in the window. Nothing is learned and no weight changes; the policy
holds the sizes. `as_released` keeps the released code's double count of keys that are both old and
in an early query's window.
"""

from collections.abc import Iterator
from typing import Self

import torch
from pydantic import Field, model_validator

from compressor.attention.policy import AttentionPolicy, rule_policy
from compressor.attention.rules.infllm_memory import InfLLMMemory as Memory
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import OF_METHODS, Cost, ModelPass
from compressor.methods.common.context import PlanContext
from compressor.methods.common.learned import Learned


class InfLLMMemory(ModelPass[Learned]):
    """Let every layer look up blocks of what has left its window; changes no weight."""

    init: int = Field(128, ge=0, description="first tokens, always seen")
    local: int = Field(4096, ge=1, description="tokens of the window; at most what was trained")
    block: int = Field(128, ge=1, description="tokens of a block")
    top_k: int = Field(16, ge=1, description="blocks that a piece looks up")
    representatives: int = Field(4, ge=1, description="tokens of a block that stand for it")
    piece: int = Field(512, ge=1, description="queries of a prompt that look up together")
    by_head: bool = Field(False, description="each query head looks up for itself")
    cached: int = Field(32, ge=1, description="blocks that a device would hold")
    decay: float | None = Field(
        None, ge=0, le=1, description="LRU-S: what an idle block keeps of its value; null: LRU"
    )
    as_released: bool = Field(False, description="with the released code's double count")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ = self._rule  # raises where sizes do not fit
        return self

    @property
    def _rule(self) -> Memory:
        return Memory(**self.model_dump(exclude=OF_METHODS))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        trained = context.layout.sizes.positions
        if trained is not None and self.local > trained:
            yield InputError(
                f"a window of {self.local} tokens is past the {trained} that the model has places "
                "for",
                hint=f"local: {trained // 2}",
            )
        if context.config.get("sliding_window") and context.config.get("use_sliding_window", True):
            yield InputError("InfLLM's memory is not for layers that have a window of their own")

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        seen = self.init + self.local + self.top_k * self.block
        return Cost(
            notes=(f"a query sees at most {seen:,} tokens and a piece, however long a text",)
        )

    def policy(self, layout: ModelLayout, learned: Learned | None) -> AttentionPolicy:
        made_by = {"infllm_memory": self.parameters}
        return rule_policy(layout, self._rule, made_by=made_by, positions="slot")
