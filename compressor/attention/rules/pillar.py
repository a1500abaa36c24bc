"""SparseSpec's PillarAttn (arXiv 2512.01278): drafts of self-speculative decoding read the keys
that the last verification attended to most."""

import math
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from compressor_kernels.attention.block_attention import block_attention
from compressor_kernels.attention.verify_attention import (
    critical_keys,
    critical_keys_ref,
    key_shares_ref,
)
from pydantic import Field
from torch import Tensor

from compressor.attention.key_blocks import by_kernel
from compressor.attention.masked import OwnAttention
from compressor.attention.policy import AttentionPolicy
from compressor.attention.rule import Phase, Rule, RuleCall, Seen, share_of

SHARES, BEGUN, KEYS, LENGTH = "pillar.shares", "pillar.begun", "pillar.keys", "pillar.length"


class Pillar(Rule):
    """Draft tokens see critical keys, by KV head, and every token since these were chosen.

    stride      tokens that are drafted in a row;  ratio  share of all keys that a draft reads
    min_budget  keys that it reads at least
    Prompts, steps and verifications see everything, or what other rules say. Before the first
    verification drafts do, too.
    """

    title: ClassVar[str] = "PillarAttn"
    phases: ClassVar[frozenset[Phase]] = frozenset(("draft",))

    stride: int = Field(8, ge=1)
    ratio: float = Field(0.05, gt=0, le=1)
    min_budget: int = Field(128, ge=1)

    def budget(self, length: int) -> int:
        """Keys of a text of `length` tokens that a draft reads."""
        return min(length, max(self.min_budget, math.ceil(length * self.ratio)))

    def watch(self, call: RuleCall) -> None:
        if call.memory is None:
            return
        shares = key_shares_ref(call.query, call.key, scale=call.scaling)
        begun = call.key.shape[2] - call.query.shape[2]
        call.memory[SHARES] = shares.bfloat16()
        call.memory[BEGUN] = torch.full((call.key.shape[0],), begun)

    def chosen(self, call: RuleCall) -> tuple[Tensor | None, int]:
        """Critical keys [rows, kv_heads, n], ascending, and the text's length when they were
        chosen; None: all keys."""
        memory = call.memory
        if memory is not None and SHARES in memory:
            # The first draft since a verification: what it kept is what the text grew by.
            length = call.key.shape[2] - call.query.shape[2]
            recent = length - int(memory[BEGUN][0]) + 1
            choose = critical_keys if by_kernel(call.key) else critical_keys_ref
            memory[KEYS] = choose(
                memory.pop(SHARES),
                length=length,
                recent=recent,
                budget=self.budget(length),
            )
            memory[LENGTH] = torch.full((call.key.shape[0],), length)
        if memory is None or KEYS not in memory:
            return None, 0
        return memory[KEYS], int(memory[LENGTH][0])

    def seen(self, call: RuleCall) -> Seen:
        keys, since = self.chosen(call)

        def mask(part: slice) -> Tensor:
            past = call.positions <= call.own[part, None]
            if keys is None:
                return past[None, None]
            read = torch.zeros(
                (*keys.shape[:2], call.key.shape[2]), dtype=torch.bool, device=call.key.device
            )
            read.scatter_(-1, keys.long(), True)
            read[..., since:] = True
            return read[:, :, None] & past

        return mask

    def attend(self, call: RuleCall, value: Tensor, own: OwnAttention) -> Tensor:
        keys, since = self.chosen(call)
        plain = own.softcap is None and own.window is None and call.query.shape[2] == 1
        if keys is None or not plain or not by_kernel(call.key):
            return super().attend(call, value, own)
        new = torch.arange(since, call.key.shape[2], device=keys.device, dtype=keys.dtype)
        read = torch.cat([keys, new.expand(*keys.shape[:2], -1)], -1)
        return block_attention(
            call.query, call.key, value, read[:, :, None], block_size=1, scale=own.scaling
        )

    @classmethod
    def describe(cls, rules: Sequence[Self], policy: AttentionPolicy) -> list[str]:
        rule = rules[0]
        return [
            f"{share_of(rules, policy)} draft {rule.stride} tokens over {rule.ratio:.0%} "
            f"of the keys, at least {rule.min_budget}: those that verifying attended to most"
        ]
