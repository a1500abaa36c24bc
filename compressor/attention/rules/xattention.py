"""XAttention (arXiv 2503.16428): prompts in tiles, those that an estimate along antidiagonals of
the scores finds worth a share of attention, by query head."""

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from compressor_kernels.attention.antidiagonal import (
    antidiagonal_sums,
    antidiagonal_sums_ref,
    covering_blocks,
    covering_blocks_ref,
)
from compressor_kernels.attention.tile_attention import tile_attention, tile_mask
from compressor_kernels.triton.launch import pow2
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.key_blocks import by_kernel
from compressor.attention.masked import OwnAttention
from compressor.attention.policy import AttentionPolicy
from compressor.attention.rule import Phase, Rule, RuleCall, Seen, share_of


class XAttention(Rule):
    """Blocks of a prompt's queries attend to the blocks of keys that hold a share of the estimate.

    threshold   the share, for each query head of the rule's KV heads
    block_size  queries and keys of a block;  stride  of the estimate
    as_released  whether the first chunk's blocks are chosen as the released code does it, which
                takes about one block more than the share needs
    calibrated  tokens of the rows that thresholds were calibrated on; None: they were given
    Chunks of a prompt that are whole blocks give what one pass does.
    """

    phases: ClassVar[frozenset[Phase]] = frozenset(("prefill",))
    title: ClassVar[str] = "XAttention"

    threshold: tuple[float, ...] = Field(min_length=1, strict=False)
    block_size: int = Field(128, ge=16, le=128)
    stride: int = Field(8, ge=1)
    as_released: bool = False
    calibrated: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.block_size != pow2(self.block_size) or self.block_size % self.stride:
            raise ValueError(
                f"block_size {self.block_size} is no power of two that stride {self.stride} divides"
            )
        if not all(0 <= share <= 1 for share in self.threshold):
            raise ValueError("thresholds are shares from 0 to 1")
        return self

    def acts(self, length: int) -> bool:
        return length > self.block_size

    def chosen(self, call: RuleCall) -> Tensor:
        """Tiles, bool [rows, heads, query blocks, key blocks]."""
        sums = (antidiagonal_sums if by_kernel(call.key) else antidiagonal_sums_ref)(
            call.query, call.key, block_size=self.block_size, stride=self.stride, scale=call.scaling
        )
        tokens = call.key.shape[2]
        first = (tokens - call.query.shape[2]) // self.block_size
        theirs = released_chunk(tokens) // self.block_size if self.as_released else 0
        share = torch.tensor(self.threshold, dtype=torch.float64)
        chosen: Tensor
        if by_kernel(call.key) and not theirs:
            chosen = covering_blocks(sums, share, first=first)
        else:
            chosen = covering_blocks_ref(sums, share, first=first, reference_rows=theirs)
        return chosen

    def seen(self, call: RuleCall) -> Seen:
        chosen, q_len, k_len = self.chosen(call), call.query.shape[2], call.key.shape[2]

        def mask(part: slice) -> Tensor:
            return tile_mask(chosen, q_len, k_len, block_size=self.block_size, part=part)

        return mask

    def attend(self, call: RuleCall, value: Tensor, own: OwnAttention) -> Tensor:
        if not by_kernel(call.key) or own.softcap is not None or own.window is not None:
            return super().attend(call, value, own)
        return tile_attention(
            call.query,
            call.key,
            value,
            self.chosen(call),
            block_size=self.block_size,
            scale=own.scaling,
        )

    @property
    def fitted(self) -> int | None:
        return self.calibrated

    def misfit(self, heads: int, kv_heads: int) -> str | None:
        own = (len(self.heads) if self.heads else kv_heads) * (heads // kv_heads)
        if len(self.threshold) == own:
            return None
        return f"xattention has {len(self.threshold)} thresholds for {own} query heads"

    @classmethod
    def describe(cls, rules: Sequence[Self], policy: AttentionPolicy) -> list[str]:
        shares = [share for rule in rules for share in rule.threshold]
        rule = rules[0]
        return [
            f"{share_of(rules, policy)} read prompts in tiles of {rule.block_size} that "
            f"hold {min(shares):.0%} to {max(shares):.0%} of XAttention's estimate, by query head"
        ]


def released_chunk(tokens: int) -> int:
    """Tokens of a chunk in the released code, which estimates a prompt chunk by chunk."""
    longest = pow2(tokens)
    return int(max(2048, min(longest, 128 * 1024 * 2048 // longest)))
