"""Which blocks of keys a layer's queries choose under its policy, from what its attention sees.

The rules are InfLLM-V2's, Quest's (arXiv 2406.10774) and SparDA's (arXiv 2606.04511); kernels serve
half precision on a GPU, their plain references everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from compressor_kernels.attention.block_pages import (
    page_bounds,
    page_bounds_ref,
    page_scores,
    page_scores_ref,
)
from compressor_kernels.attention.block_selection import BlockRule, top_blocks, top_blocks_ref
from compressor_kernels.attention.block_windows import (
    WindowRule,
    attention_blocks,
    attention_scores_ref,
    compress_keys,
    compress_keys_ref,
    forecast_blocks,
    forecast_scores_ref,
)
from torch import Tensor

from compressor.attention.policy import BlockSelection
from compressor.attention.rope import Rotary, rotated
from compressor.errors import InputError

PIECE_ELEMENTS = {"cuda": 2**25, "cpu": 2**23}
"""Scores of a piece of the queries that are in memory at a time, a few times over."""


def rules(selection: BlockSelection) -> tuple[BlockRule, WindowRule]:
    """The rule of blocks and that of compressed keys."""
    block = BlockRule(
        block_size=selection.block_size,
        init_blocks=selection.init_blocks,
        local_blocks=selection.local_blocks,
        top_k=selection.top_k,
    )
    if selection.scorer == "quest":
        return block, WindowRule(kernel_size=1, stride=1)
    return block, WindowRule(kernel_size=selection.kernel_size, stride=selection.stride)


def choose_blocks(
    selection: BlockSelection,
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    forecast: Tensor | None = None,
) -> Tensor:
    """Blocks of each query, int32 [rows, sets, Tq, K], ascending, then -1.

    query [rows, heads, Tq, head_dim] of the last Tq tokens of key [rows, kv_heads, T, head_dim],
    forecast [rows, kv_heads, Tq, head_dim] where the scorer is one; all rotated by position. There
    is a set for each KV head, or for each query head with `per: query_head`.
    """
    rule, windows = rules(selection)
    tokens = key.shape[2]
    fast = key.is_cuda and key.dtype in (torch.float16, torch.bfloat16)
    if selection.scorer == "quest":
        return _by_pages(selection, query, key, rule, fast=fast)
    by_forecast = selection.scorer == "forecast"
    if by_forecast and forecast is None:
        raise InputError("blocks are to be chosen by a forecast, and there is none")
    asked = forecast if by_forecast and forecast is not None else query
    if fast:
        compressed, asked = compress_keys(key, windows), asked.to(key.dtype)
        choices: Tensor = (
            forecast_blocks(asked, compressed, rule, windows, tokens=tokens)
            if by_forecast
            else attention_blocks(asked, compressed, rule, windows, tokens=tokens, scale=scaling)
        )
        return choices
    compressed = compress_keys_ref(key, windows)

    def choose(part: Tensor, behind: int) -> Tensor:
        scores = (
            forecast_scores_ref(part, compressed, rule, windows, tokens=tokens, behind=behind)
            if by_forecast
            else attention_scores_ref(
                part, compressed, rule, windows, tokens=tokens, behind=behind, scale=scaling
            )
        )
        blocks: Tensor = top_blocks_ref(scores, rule, tokens=tokens, behind=behind)
        return blocks

    return in_pieces(choose, asked, asked.shape[1] * max(1, windows.windows(tokens)))


def recent_blocks(selection: BlockSelection, query: Tensor, key: Tensor) -> Tensor:
    """The first blocks and the most recent ones, as many as the selection has: what it costs
    nothing to choose. int32 [rows, kv_heads, Tq, K]."""
    rule, _ = rules(selection)
    count = rule.blocks(key.shape[2])
    shape = (key.shape[0], key.shape[1], query.shape[2], count)
    age = torch.arange(count, device=key.device, dtype=torch.float32).expand(shape)
    blocks: Tensor = top_blocks_ref(age, rule, tokens=key.shape[2])
    return blocks


def _by_pages(
    selection: BlockSelection, query: Tensor, key: Tensor, rule: BlockRule, *, fast: bool
) -> Tensor:
    group_max = selection.per == "kv_head"
    tokens, size = key.shape[2], rule.block_size
    if fast and query.shape[2] == 1:
        scores = page_scores(query, *page_bounds(key, page_size=size), group_max=group_max)
        blocks: Tensor = top_blocks(scores, rule, tokens=tokens)
        return blocks
    # Only a query's own page may hold keys after it, and that page is chosen whatever its score.
    low, high = (page_bounds if fast else page_bounds_ref)(key, page_size=size)

    def choose(part: Tensor, behind: int) -> Tensor:
        scores = page_scores_ref(part, low, high, group_max=group_max)
        blocks: Tensor = top_blocks_ref(scores, rule, tokens=tokens, behind=behind)
        return blocks

    return in_pieces(choose, query, query.shape[1] * rule.blocks(tokens))


def in_pieces(
    choose: Callable[[Tensor, int], Tensor], queries: Tensor, row_elements: int
) -> Tensor:
    """`choose(part, tokens behind it)` over parts of the queries [rows, heads, Tq, head_dim]."""
    q_len = queries.shape[2]
    most = PIECE_ELEMENTS.get(queries.device.type, PIECE_ELEMENTS["cuda"])
    size = max(1, most // (queries.shape[0] * row_elements))
    found = []
    for start in range(0, q_len, size):
        part = queries[:, :, start : start + size]
        found.append(choose(part, q_len - start - part.shape[2]))
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def forecast_of(hidden: Tensor, weight: Tensor, *, kv_heads: int, rotary: Rotary | None) -> Tensor:
    """What attention's input [rows, length, hidden] says of the keys to come, [rows, kv_heads,
    length, head_dim], rotated by position. weight [kv_heads * head_dim, hidden]."""
    flat = torch.nn.functional.linear(hidden.to(weight.dtype), weight)
    heads = flat.view(*flat.shape[:2], kv_heads, -1).transpose(1, 2)
    return heads if rotary is None else rotated(heads, rotary)
