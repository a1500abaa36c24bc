"""Rules by which queries choose blocks of keys: what they share.

Kernels serve half precision on a GPU, their plain references everything else.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from compressor_kernels.attention.block_attention import block_attention, block_mask
from compressor_kernels.attention.block_selection import BlockRule, top_blocks_ref
from compressor_kernels.attention.block_windows import WindowRule
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.masked import OwnAttention
from compressor.attention.policy import AttentionPolicy
from compressor.attention.rule import Rule, RuleCall, Seen

HALF = (torch.float16, torch.bfloat16)


class KeyBlocks(Rule):
    """Each query attends to the blocks of keys that score best.

    block_size   keys of a block;  top_k  blocks of a query, forced ones included
    kernel_size, stride  of mean keys, for rules that score by them
    init_blocks, local_blocks  first blocks, and blocks before the query's own, always chosen
    per          whether all query heads of a KV head share one choice
    dense_below  texts of fewer keys are attended to whole
    """

    part: ClassVar[str] = "blocks"

    block_size: int = Field(64, ge=1)
    kernel_size: int = Field(32, ge=1)
    stride: int = Field(16, ge=1)
    init_blocks: int = Field(1, ge=0)
    local_blocks: int = Field(32, ge=0)
    top_k: int = Field(96, ge=1)
    per: Literal["kv_head", "query_head"] = "kv_head"
    dense_below: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _holds_forced_blocks(self) -> Self:
        if self.init_blocks + self.local_blocks + 1 > self.top_k:
            raise ValueError(
                f"top_k {self.top_k} cannot hold {self.init_blocks} first blocks, "
                f"{self.local_blocks} local ones and the query's own"
            )
        return self

    @property
    def blocks(self) -> BlockRule:
        """How blocks are chosen once they have scores."""
        return BlockRule(
            block_size=self.block_size,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
            top_k=self.top_k,
        )

    @property
    def windows(self) -> WindowRule:
        """The compression of keys."""
        return WindowRule(kernel_size=self.kernel_size, stride=self.stride)

    @abstractmethod
    def choose(self, call: RuleCall) -> Tensor:
        """Blocks of each query, int32 [rows, sets, Tq, K], ascending, then -1. There is a set for
        each KV head, or for each query head with `per: query_head`."""

    def acts(self, length: int) -> bool:
        return length >= self.dense_below

    def seen(self, call: RuleCall) -> Seen:
        return self.seen_in(self.choose(call), call.key.shape[2])

    def seen_in(self, blocks: Tensor, tokens: int) -> Seen:
        """The mask of chosen blocks [rows, sets, Tq, K], of the last queries of `tokens`."""

        def mask(part: slice) -> Tensor:
            behind = blocks.shape[2] - part.stop
            return block_mask(blocks[:, :, part], tokens, block_size=self.block_size, behind=behind)

        return mask

    def attend(self, call: RuleCall, value: Tensor, own: OwnAttention) -> Tensor:
        plain = own.softcap is None and own.window is None
        if not (call.query.is_cuda and call.query.dtype in HALF and plain):
            return super().attend(call, value, own)
        q, k, blocks = call.query, call.key, self.choose(call)
        return block_attention(q, k, value, blocks, block_size=self.block_size, scale=own.scaling)

    def share_read(self, length: int) -> float:
        """Share of the keys of a text of `length` tokens that its last query attends to."""
        return min(1.0, self.top_k / self.blocks.blocks(length))

    @classmethod
    def describe(cls, rules: Sequence[Self], policy: AttentionPolicy) -> list[str]:
        when = {"prefill": " in prompts", "decode": " in steps of decoding"}
        of = "".join(text for phase, text in when.items() if cls.phases & when.keys() == {phase})
        whom = {
            "query_head": "each query head",
            "kv_head": "the query heads of each KV head together",
        }
        return [
            f"{rules.count(rule)} of {len(policy.layers)} layers read {rule.top_k} blocks of "
            f"{rule.block_size} keys{of}, chosen for {whom[rule.per]} by {cls.title}"
            + (f", in texts of {rule.dense_below} keys and more" if rule.dense_below else "")
            for rule in dict.fromkeys(rules)
        ]

    def to_json(self) -> dict[str, Any]:
        return {"scorer": self.kind, **super().to_json()}


def recent_blocks(rule: KeyBlocks, query: Tensor, key: Tensor) -> Tensor:
    """The first blocks and the most recent ones, as many as the rule has: what it costs nothing to
    choose. int32 [rows, kv_heads, Tq, K]."""
    count = rule.blocks.blocks(key.shape[2])
    shape = (key.shape[0], key.shape[1], query.shape[2], count)
    age = torch.arange(count, device=key.device, dtype=torch.float32).expand(shape)
    return top_blocks_ref(age, rule.blocks, tokens=key.shape[2])


def by_kernel(key: Tensor) -> bool:
    """Whether the kernels score such keys."""
    return key.is_cuda and key.dtype in HALF
