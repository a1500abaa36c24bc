"""Quest's pages (arXiv 2406.10774): blocks by the bounds of what a query's product with their keys
can be."""

from typing import ClassVar

from compressor_kernels.attention.block_pages import (
    page_bounds,
    page_bounds_ref,
    page_scores,
    page_scores_ref,
)
from compressor_kernels.attention.block_selection import top_blocks, top_blocks_ref
from torch import Tensor

from compressor.attention.key_blocks import KeyBlocks, by_kernel
from compressor.attention.masked import in_pieces
from compressor.attention.rule import RuleCall


class QuestPages(KeyBlocks):
    """A page is a block; nothing is compressed, so `kernel_size` and `stride` say nothing."""

    title: ClassVar[str] = "Quest's bounds"

    def choose(self, call: RuleCall) -> Tensor:
        group_max = self.per == "kv_head"
        query, key, rule = call.query, call.key, self.blocks
        tokens, size, fast = key.shape[2], self.block_size, by_kernel(key)
        if fast and query.shape[2] == 1:
            scores = page_scores(query, *page_bounds(key, page_size=size), group_max=group_max)
            return top_blocks(scores, rule, tokens=tokens)
        # Only a query's own page may hold keys after it: it is chosen whatever its score.
        low, high = (page_bounds if fast else page_bounds_ref)(key, page_size=size)

        def choose(part: Tensor, behind: int) -> Tensor:
            scores = page_scores_ref(part, low, high, group_max=group_max)
            top = top_blocks if fast else top_blocks_ref
            return top(scores, rule, tokens=tokens, behind=behind)

        return in_pieces(choose, query, query.shape[1] * rule.blocks(tokens))
