"""InfLLM-V2's selector: blocks by the attention that queries pay to mean keys (MiniCPM4)."""

from typing import Any, ClassVar, Self

from compressor_kernels.attention.block_selection import top_blocks_ref
from compressor_kernels.attention.block_windows import (
    attention_blocks,
    attention_scores_ref,
    compress_keys,
    compress_keys_ref,
)
from pydantic import model_validator
from torch import Tensor

from compressor.attention.key_blocks import KeyBlocks, by_kernel
from compressor.attention.masked import in_pieces
from compressor.attention.rule import RuleCall


class InfLLMBlocks(KeyBlocks):
    """One choice for all heads that share a KV head."""

    title: ClassVar[str] = "InfLLM-V2's selector"

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.block_size % self.stride:
            raise ValueError(f"stride {self.stride} does not divide block_size {self.block_size}")
        return self

    def choose(self, call: RuleCall) -> Tensor:
        query, tokens = self.asks(call), call.key.shape[2]
        if by_kernel(call.key):
            return self.best(query, compress_keys(call.key, self.windows), call)
        compressed = compress_keys_ref(call.key, self.windows)

        def choose(part: Tensor, behind: int) -> Tensor:
            scores = self.scores(part, compressed, call, behind=behind)
            return top_blocks_ref(scores, self.blocks, tokens=tokens, behind=behind)

        return in_pieces(choose, query, query.shape[1] * max(1, self.windows.windows(tokens)))

    def asks(self, call: RuleCall) -> Tensor:
        """What is compared with the mean keys, [rows, heads, Tq, head_dim]."""
        return call.query

    def scores(self, query: Tensor, compressed: Tensor, call: RuleCall, *, behind: int) -> Tensor:
        """Scores of all blocks for some queries, [rows, kv_heads, n, blocks]."""
        return attention_scores_ref(
            query,
            compressed,
            self.blocks,
            self.windows,
            tokens=call.key.shape[2],
            behind=behind,
            scale=call.scaling,
        )

    def best(self, query: Tensor, compressed: Tensor, call: RuleCall) -> Tensor:
        """The blocks themselves, by the kernel."""
        return attention_blocks(
            query,
            compressed,
            self.blocks,
            self.windows,
            tokens=call.key.shape[2],
            scale=call.scaling,
        )

    def config(self) -> dict[str, Any]:
        """`sparse_config`, which MiniCPM4's and SparDA's serving code read; its `topk` does not
        count local blocks."""
        return {
            "sparse_config": {
                "kernel_size": self.kernel_size,
                "kernel_stride": self.stride,
                "init_blocks": self.init_blocks,
                "block_size": self.block_size,
                "window_size": self.local_blocks * self.block_size,
                "topk": self.top_k - self.local_blocks,
                "dense_len": self.dense_below,
                "use_nope": False,
            }
        }
