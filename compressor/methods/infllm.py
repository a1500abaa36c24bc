"""InfLLM-V2's selector (the sparse attention of MiniCPM4; InfLLM is arXiv 2402.04617).

Each query attends to 64-token blocks of keys, one choice for all heads that share a KV head: the
first blocks, the blocks before its own, and the blocks whose mean keys its heads attend to most.
Nothing is learned and no weight changes. Models trained with this attention keep their quality; a
dense model loses what its attention spreads over more blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.key_blocks import KeyBlocks
from compressor.attention.policy import AttentionPolicy, rule_policy
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import FrozenModel, LearnContext, Learned, ModelPass, Outlook


class InfLLM(ModelPass):
    """Let every layer attend to blocks that attention to mean keys chooses; changes no weight."""

    version: ClassVar[int] = 1
    reads_tokens: ClassVar[bool] = False
    rule: ClassVar[type[InfLLMBlocks]] = InfLLMBlocks

    block_size: int = Field(64, ge=1, description="keys of a block")
    kernel_size: int = Field(32, ge=1, description="keys that a compressed key is the mean of")
    stride: int = Field(16, ge=1, description="keys from one compressed key to the next")
    init_blocks: int = Field(1, ge=0, description="first blocks, always chosen")
    local_blocks: int = Field(32, ge=0, description="blocks before the query's own, always chosen")
    top_k: int = Field(96, ge=1, description="blocks of a query, always chosen ones included")
    dense_below: int = Field(8192, ge=0, description="shorter texts are attended to whole")

    @model_validator(mode="after")
    def _fits(self) -> InfLLM:
        if self.kernel_size % self.stride:
            raise ValueError(f"stride {self.stride} does not divide kernel_size {self.kernel_size}")
        assert self.block_choice
        return self

    @property
    def block_choice(self) -> InfLLMBlocks:
        """What layers do."""
        return self.rule(
            block_size=self.block_size,
            kernel_size=self.kernel_size,
            stride=self.stride,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
            top_k=self.top_k,
            dense_below=self.dense_below,
        )

    def outlook(
        self, layout: ModelLayout, *, parameters: int, rows: int, length: int, dtype: torch.dtype
    ) -> Outlook:
        try:
            policy = rule_policy(layout, self.block_choice, made_by={"infllm": {}})
        except InputError as error:
            return Outlook(problems=(error,))
        return Outlook(notes=(reads(self.block_choice),), policy=policy)

    def config_entries(self, layout: ModelLayout) -> Mapping[str, Any]:
        return self.block_choice.config()

    def learn(self, model: FrozenModel, context: LearnContext) -> Learned:
        made_by = {"infllm": self.model_dump(mode="json", exclude={"targets", "ignore"})}
        policy = rule_policy(model.layout, self.block_choice, made_by=made_by)
        return Learned(policy=policy.to_json())

    def policy_again(
        self, layout: ModelLayout, stored: AttentionPolicy, values: Mapping[str, Tensor]
    ) -> AttentionPolicy:
        return rule_policy(layout, self.block_choice, made_by={})


def reads(rule: KeyBlocks, length: int = 65536) -> str:
    """What a rule saves, for people."""
    share = rule.share_read(length)
    return (
        f"{rule.top_k} blocks of {rule.block_size} keys: after {length:,} tokens a "
        f"query reads {share:.1%} of them"
    )


PASS = InfLLM
