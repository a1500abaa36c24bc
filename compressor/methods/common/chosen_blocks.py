"""What methods share by which layers attend to blocks of keys that a rule chooses."""

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Self

from pydantic import Field, model_validator

from compressor.attention.key_blocks import KeyBlocks
from compressor.attention.policy import AttentionPolicy, rule_policy
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.ir.layout import ModelLayout
from compressor.methods.base import OF_METHODS, L, ModelPass


class ChosenBlocks(ModelPass[L], Generic[L]):
    """Blocks that compressed keys choose: InfLLM-V2's parameters."""

    rule: ClassVar[type[InfLLMBlocks]] = InfLLMBlocks

    block_size: int = Field(64, ge=1, description="keys of a block")
    kernel_size: int = Field(32, ge=1, description="keys that a compressed key is the mean of")
    stride: int = Field(16, ge=1, description="keys from one compressed key to the next")
    init_blocks: int = Field(1, ge=0, description="first blocks, always chosen")
    local_blocks: int = Field(32, ge=0, description="blocks before the query's own, always chosen")
    top_k: int = Field(96, ge=1, description="blocks of a query, always chosen ones included")
    dense_below: int = Field(8192, ge=0, description="shorter texts are attended to whole")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kernel_size % self.stride:
            raise ValueError(f"stride {self.stride} does not divide kernel_size {self.kernel_size}")
        _ = self.block_choice  # raises where they do not fit each other
        return self

    @property
    def block_choice(self) -> InfLLMBlocks:
        """What layers do."""
        return self.rule(**self.model_dump(include=set(ChosenBlocks.model_fields) - OF_METHODS))

    def everywhere(self, layout: ModelLayout, made_by: Mapping[str, Any]) -> AttentionPolicy:
        """The policy by which every layer chooses so. Raises InputError where none can."""
        return rule_policy(layout, self.block_choice, made_by=made_by)


def reads(rule: KeyBlocks) -> str:
    """What a rule saves, for people."""
    read = f"a query reads {rule.share_read(65536):.1%} of them"
    return f"{rule.top_k} blocks of {rule.block_size} keys: after 65,536 tokens {read}"
