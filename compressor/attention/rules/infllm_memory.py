"""InfLLM's context memory (arXiv 2402.04617) as a rule: texts past the trained length, without
training."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.context_memory import ContextMemory, MemorySizes
from compressor.attention.masked import OwnAttention
from compressor.attention.policy import AttentionPolicy
from compressor.attention.rope import Rotary, rotated_back
from compressor.attention.rule import Rule, RuleCall, share_of
from compressor.errors import InputError
from compressor.runner.attention_call import AttentionCall

MEMORY = "infllm_memory"


class InfLLMMemory(Rule):
    """All heads see a window of `local` tokens, `init` first ones, and `top_k` blocks of the rest.

    block, representatives  tokens of a block, and those of them that stand for it
    piece        queries of a prompt that look up together
    by_head      whether each query head looks up for itself
    cached, decay  blocks that a device would hold, and what its LRU-S keeps of an idle block's
                 attention from piece to piece; without `decay` it is an LRU
    as_released  whether old keys that are still in a query's window count twice, as in the
                 released code; else they count once
    Positions are by slot: keys are held as they are before the rotary embedding. Pieces begin where
    a call does, so that a prompt in chunks of whole pieces gives what one pass does.
    """

    by_slot: ClassVar[bool] = True
    by_text: ClassVar[bool] = False
    title: ClassVar[str] = "InfLLM's memory"

    init: int = Field(128, ge=0)
    local: int = Field(4096, ge=1)
    block: int = Field(128, ge=1)
    top_k: int = Field(16, ge=1)
    representatives: int = Field(4, ge=1)
    piece: int = Field(512, ge=1)
    by_head: bool = False
    cached: int = Field(32, ge=1)
    decay: float | None = Field(None, ge=0, le=1)
    as_released: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.piece > self.local:
            raise ValueError(f"a piece of {self.piece} is longer than the window of {self.local}")
        if self.representatives > self.block:
            raise ValueError(f"{self.representatives} of {self.block} tokens cannot stand for them")
        if self.cached < self.top_k:
            raise ValueError(f"{self.cached} cached blocks do not hold {self.top_k} chosen ones")
        return self

    @property
    def sizes(self) -> MemorySizes:
        """Of the memory."""
        own = self.model_dump(exclude={"heads", "as_released"})
        return MemorySizes(**own, twice=self.as_released)

    def evaluate_by_slot(self, call: AttentionCall) -> Tensor:
        if call.rotary is None:
            raise InputError("InfLLM's memory needs a rotary embedding, which this model has not")
        if call.mask is not None and _hides(call.mask[0, 0, -1, 0]):
            raise InputError("InfLLM's memory is not for attention with a window of its own")
        cos, sin = call.rotary
        place = torch.arange(call.key.shape[2], device=call.key.device)
        # What a scaled embedding multiplies by is in the queries and keys already.
        rotary = (cos / cos[0], sin / cos[0])
        query, key = (rotated_back(x, place, call.rotary) for x in (call.query, call.key))
        out = [
            ContextMemory(self.sizes).attend(*row, rotary=rotary, scaling=call.scaling)
            for row in zip(query, key, call.value, strict=True)
        ]
        return torch.stack(out).transpose(1, 2)

    def attend_by_slot(
        self, call: RuleCall, value: Tensor, own: OwnAttention, tables: Callable[[int], Rotary]
    ) -> Tensor:
        if own.softcap is not None or own.window is not None:
            raise InputError("InfLLM's memory is not for attention with a window or a cap")
        rows = len(call.query)
        memories = [ContextMemory(self.sizes) for _ in range(rows)]
        if call.memory is not None:
            memories = call.memory.setdefault(MEMORY, memories)
        rotary = tables(self.local + self.piece)
        out = [
            memory.attend(*row, rotary=rotary, scaling=own.scaling)
            for memory, *row in zip(memories, call.query, call.key, value, strict=True)
        ]
        return torch.stack(out)

    @classmethod
    def describe(cls, rules: Sequence[Self], policy: AttentionPolicy) -> list[str]:
        rule = rules[0]
        return [
            f"{share_of(rules, policy)} see {rule.init} first and {rule.local} recent "
            f"tokens and look up {rule.top_k} blocks of {rule.block} (InfLLM's memory)"
        ]


def _hides(entry: Tensor) -> bool:
    """Whether an entry of a mask, boolean or additive, hides a key."""
    return not bool(entry) if entry.dtype == torch.bool else float(entry) < 0
