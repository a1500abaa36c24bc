"""Attention over chosen blocks as evaluations run it: a hook for each block of the model.

The whole text is one pass in which every query chooses for itself, as a decoding step would. A
forecast is made one block earlier than it is used: what it says is carried from block to block,
row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from compressor_kernels.attention.block_attention import block_mask
from torch import Tensor

from compressor.attention.key_blocks import choose_blocks, forecast_of, in_pieces
from compressor.attention.policy import AttentionPolicy, BlockSelection, LayerPolicy, layer_mask
from compressor.errors import InputError
from compressor.ir.layout import weight_name
from compressor.ir.unit import Unit
from compressor.runner.attention_call import AttentionCall, AttentionHook

FUTURE, CURRENT = weight_name("q_future_proj"), weight_name("q_curr_proj")
"""Tensors of a block's attention: what it says of the next block's keys, and block 0 of its own."""


def forecast_weights(unit: Unit) -> dict[str, Tensor]:
    """The forecasts that a block carries, by the last part of their names."""
    found = {}
    for name, tensor in unit.extra.items():
        for leaf in (FUTURE, CURRENT):
            if name.endswith(f".{leaf}"):
                found[leaf] = tensor
    return found


@dataclass(slots=True)
class Forecasts:
    """What blocks said of the keys of the blocks after them.

    Kept by block and row, so that rows which are run again (with smaller batches, because memory
    did not do) find what they found before.
    """

    said: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def take(self, layer: int, call: AttentionCall, unit: Unit) -> Tensor | None:
        """The forecast for this block and these rows, [rows, kv_heads, length, head_dim]."""
        for key in [key for key in self.said if key[0] < layer]:
            del self.said[key]
        rows = range(call.first_row, call.first_row + call.query.shape[0])
        if all((layer, row) in self.said for row in rows):
            found = torch.stack([self.said[layer, row] for row in rows])
            return found.to(call.key.device, call.key.dtype)
        weight = forecast_weights(unit).get(CURRENT)
        return None if weight is None else self._make(call, weight)

    def give(self, layer: int, call: AttentionCall, unit: Unit) -> None:
        """Note what this block says of the next one's keys."""
        weight = forecast_weights(unit).get(FUTURE)
        if weight is not None:
            for row, forecast in enumerate(self._make(call, weight).cpu()):
                self.said[layer + 1, call.first_row + row] = forecast

    def _make(self, call: AttentionCall, weight: Tensor) -> Tensor:
        if call.hidden is None:
            raise InputError("a forecast needs the attention's input, which is not known here")
        weight = weight.to(call.key.device, call.key.dtype)
        return forecast_of(call.hidden, weight, kv_heads=call.key.shape[1], rotary=call.rotary)


class BlockAttending:
    """How the blocks of one model attend where a policy chooses blocks; one for each run."""

    def __init__(self, policy: AttentionPolicy) -> None:
        self.policy = policy
        self.forecasts = Forecasts()

    def hook(self, unit: Unit) -> AttentionHook | None:
        """What attends in a block, or None where its policy chooses no blocks and the next block
        needs no forecast."""
        index = unit.layout.index
        layer = self.policy.layers[index]
        later = self.policy.layers[index + 1 : index + 2]
        says = any(x.blocks is not None and x.blocks.scorer == "forecast" for x in later)
        if layer.blocks is None and not says:
            return None

        def hook(call: AttentionCall) -> Tensor:
            if says:
                self.forecasts.give(index, call, unit)
            selection = layer.blocks
            if selection is None or call.key.shape[2] < selection.dense_below:
                return by_mask(call, None, layer)
            forecast = None
            if selection.scorer == "forecast":
                forecast = self.forecasts.take(index, call, unit)
                if forecast is None:
                    raise InputError(
                        f"{unit.layout.name} chooses blocks by a forecast, which the checkpoint "
                        "lacks",
                        hint=f"the block before it should carry {FUTURE}, block 0 also {CURRENT}",
                    )
            blocks = choose_blocks(
                selection, call.query, call.key, scaling=call.scaling, forecast=forecast
            )
            return by_mask(call, blocks, layer)

        return hook


def by_mask(call: AttentionCall, blocks: Tensor | None, layer: LayerPolicy) -> Tensor:
    """The model's own attention where full heads see `blocks` (all keys if None) and streaming
    heads their window, [rows, length, heads, head_dim]; some queries at a time."""
    if blocks is None and layer.streaming is None:
        return call.plain(call.query, call.key, call.value)
    heads, kv_heads, length = call.query.shape[1], call.key.shape[1], call.key.shape[2]
    place = torch.arange(length, device=call.key.device)
    streams = torch.zeros(kv_heads, dtype=torch.bool, device=call.key.device)
    if layer.streaming is not None:
        streams[list(layer.streaming.heads)] = True
    streams = streams.repeat_interleave(heads // kv_heads)

    def attend(query: Tensor, behind: int) -> Tensor:
        stop = length - behind
        part = slice(stop - query.shape[2], stop)
        by_head = layer_mask(layer, kv_heads=kv_heads, queries=place[part], keys=place)
        mask = by_head.repeat_interleave(heads // kv_heads, dim=0)[None]
        if blocks is not None:
            size = _size(layer.blocks)
            seen = block_mask(blocks[:, :, part], length, block_size=size, behind=behind)
            seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
            mask = torch.where(streams[None, :, None, None], mask, seen)
        if call.mask is not None and call.mask.dtype == torch.bool:
            mask = mask & call.mask[..., part, :]
        elif call.mask is not None:
            own = call.mask[..., part, :]
            mask = own.masked_fill(~mask, torch.finfo(own.dtype).min)
        return call.plain(query, call.key, call.value, mask).transpose(1, 2)

    return in_pieces(attend, call.query, heads * length).transpose(1, 2)


def _size(selection: BlockSelection | None) -> int:
    assert selection is not None
    return selection.block_size
