"""MoBA's blocks (arXiv 2502.13189): each query head of a prompt chooses the blocks whose mean keys
it likes best; for models that were trained with it."""

from typing import ClassVar, Literal

from compressor_kernels.attention.block_routing import (
    convolved_keys,
    gated_blocks,
    gated_blocks_ref,
    mean_keys,
    mean_keys_ref,
    routed_attention,
)
from pydantic import Field
from torch import Tensor

from compressor.attention.key_blocks import KeyBlocks, by_kernel
from compressor.attention.masked import OwnAttention, in_pieces
from compressor.attention.rope import Rotary
from compressor.attention.rule import Phase, RuleCall
from compressor.ir.layout import weight_name

KEY_CONVOLUTION = weight_name("k_conv")


class MoBABlocks(KeyBlocks):
    """A query's own block is among its `top_k`. Steps of decoding attend to everything, as in the
    released code.

    convolution  whether keys are mixed with those before them by the attention's `k_conv`
    """

    title: ClassVar[str] = "MoBA's gate"
    phases: ClassVar[frozenset[Phase]] = frozenset(("prefill",))

    per: Literal["query_head"] = "query_head"
    init_blocks: int = Field(0, ge=0)
    local_blocks: int = Field(0, ge=0)
    convolution: bool = False

    def ahead_tensor(self, index: int) -> tuple[int, str] | None:
        return (index, KEY_CONVOLUTION) if self.convolution else None

    def look_ahead(
        self, hidden: Tensor, weight: Tensor, *, kv_heads: int, rotary: Rotary | None
    ) -> Tensor:
        """The convolution's own weights, [rows, kv_heads, head_dim, W]."""
        by_head = weight.view(kv_heads, -1, weight.shape[-1])
        return by_head.expand(hidden.shape[0], *by_head.shape)

    def own_keys(self, key: Tensor, ahead: Tensor | None) -> Tensor:
        if ahead is None:
            return key
        weight = ahead[0].reshape(-1, 1, ahead.shape[-1]).to(key.device)
        return convolved_keys(key, weight)

    def choose(self, call: RuleCall) -> Tensor:
        query, key, tokens = call.query, call.key, call.key.shape[2]
        if by_kernel(key):
            means = mean_keys(key, block_size=self.block_size)
            return gated_blocks(query, means, self.blocks, tokens=tokens)
        means = mean_keys_ref(key, block_size=self.block_size)

        def choose(part: Tensor, behind: int) -> Tensor:
            return gated_blocks_ref(part, means, self.blocks, tokens=tokens, behind=behind)

        return in_pieces(choose, query, query.shape[1] * self.blocks.blocks(tokens))

    def attend(self, call: RuleCall, value: Tensor, own: OwnAttention) -> Tensor:
        routed = self.block_size % 16 == 0 and own.softcap is None and own.window is None
        if not routed or not by_kernel(call.key):
            return super().attend(call, value, own)
        q, k, blocks = call.query, call.key, self.choose(call)
        return routed_attention(q, k, value, blocks, block_size=self.block_size, scale=own.scaling)
