"""SparDA's forecast (arXiv 2606.04511): blocks that a projection one block earlier asks for.

What enters a block's attention, times its `q_future_proj`, is compared with the mean keys of the
next block; block 0 has a `q_curr_proj` for its own.
"""

from typing import ClassVar

import torch
from compressor_kernels.attention.block_windows import forecast_blocks, forecast_scores_ref
from torch import Tensor

from compressor.attention.key_blocks import by_kernel
from compressor.attention.rope import Rotary, rotated
from compressor.attention.rule import RuleCall
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.errors import InputError
from compressor.ir.layout import weight_name

FUTURE, CURRENT = weight_name("q_future_proj"), weight_name("q_curr_proj")
"""Tensors of a block's attention: what it says of the next block's keys, and block 0 of its own."""


class ForecastBlocks(InfLLMBlocks):
    """One choice for all heads that share a KV head, without a softmax."""

    title: ClassVar[str] = "forecast"

    def ahead_tensor(self, index: int) -> tuple[int, str]:
        return (index - 1, FUTURE) if index else (0, CURRENT)

    def look_ahead(
        self, hidden: Tensor, weight: Tensor, *, kv_heads: int, rotary: Rotary | None
    ) -> Tensor:
        return forecast_of(hidden, weight, kv_heads=kv_heads, rotary=rotary)

    def asks(self, call: RuleCall) -> Tensor:
        if call.ahead is None:
            raise InputError("blocks are to be chosen by a forecast, and there is none")
        ahead = call.ahead.to(call.key.device)
        return ahead.to(call.key.dtype) if by_kernel(call.key) else ahead

    def scores(self, query: Tensor, compressed: Tensor, call: RuleCall, *, behind: int) -> Tensor:
        return forecast_scores_ref(
            query, compressed, self.blocks, self.windows, tokens=call.key.shape[2], behind=behind
        )

    def best(self, query: Tensor, compressed: Tensor, call: RuleCall) -> Tensor:
        return forecast_blocks(
            query, compressed, self.blocks, self.windows, tokens=call.key.shape[2]
        )


def forecast_of(hidden: Tensor, weight: Tensor, *, kv_heads: int, rotary: Rotary | None) -> Tensor:
    """What attention's input [rows, length, hidden] says of the keys to come, [rows, kv_heads,
    length, head_dim], rotated by position. weight [kv_heads * head_dim, hidden]."""
    flat = torch.nn.functional.linear(hidden.to(weight.dtype), weight)
    heads = flat.view(*flat.shape[:2], kv_heads, -1).transpose(1, 2)
    return heads if rotary is None else rotated(heads, rotary)
