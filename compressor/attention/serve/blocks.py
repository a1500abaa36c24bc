"""Attention over chosen blocks of keys in a running model, and the forecasts that choose them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from compressor_kernels.attention.block_attention import block_attention, block_mask
from torch import Tensor

from compressor.attention.key_blocks import choose_blocks, forecast_of, in_pieces
from compressor.attention.policy import AttentionPolicy, BlockSelection
from compressor.attention.rope import Rotary
from compressor.attention.serve.attend import Rule, softmax_attention
from compressor.checkpoint.reader import open_checkpoint
from compressor.errors import InputError

FORECAST_NAME = re.compile(r".*\.(\d+)\.[^.]+\.(q_future_proj|q_curr_proj)\.\w+")


def stored_forecasts(folder: Path) -> dict[str, Tensor]:
    """The forecast tensors of a checkpoint folder, by name."""
    checkpoint = open_checkpoint(folder)
    names = [name for name in checkpoint.entries if FORECAST_NAME.fullmatch(name)]
    return checkpoint.read(names) if names else {}


class ForecastsInUse:
    """What each layer says of the next one's keys, during one forward pass of a model."""

    def __init__(self, policy: AttentionPolicy, tensors: Mapping[str, Tensor]) -> None:
        self.policy = policy
        self._future: dict[int, Tensor] = {}
        self._current: Tensor | None = None
        for name, tensor in tensors.items():
            found = FORECAST_NAME.fullmatch(name)
            if found and found[2] == "q_future_proj":
                self._future[int(found[1])] = tensor
            elif found and int(found[1]) == 0:
                self._current = tensor
        self._said: dict[int, Tensor] = {}
        for layer, kind in enumerate(policy.layers):
            if kind.blocks is None or kind.blocks.scorer != "forecast":
                continue
            if layer - 1 not in self._future and (layer or self._current is None):
                raise InputError(
                    f"layer {layer} chooses blocks by a forecast, which the checkpoint lacks",
                    hint="attach the policy of the folder that the forecasts are in",
                )

    def enter(self, layer: int, hidden: Tensor, rotary: Rotary | None) -> None:
        """Note what layer `layer` says, from what enters its attention [rows, length, hidden];
        rotary [length, channels]."""
        kinds = self.policy.layers[layer : layer + 2]
        if layer == 0 and self._wants(kinds[0].blocks) and self._current is not None:
            self._current = self._current.to(hidden.device)
            self._said[0] = self._make(hidden, self._current, rotary)
        if len(kinds) > 1 and self._wants(kinds[1].blocks):
            self._future[layer] = self._future[layer].to(hidden.device)
            self._said[layer + 1] = self._make(hidden, self._future[layer], rotary)

    def take(self, layer: int) -> Tensor | None:
        """What was said of this layer's keys, [rows, kv_heads, length, head_dim], once."""
        return self._said.pop(layer, None)

    def _make(self, hidden: Tensor, weight: Tensor, rotary: Rotary | None) -> Tensor:
        kv_heads = self.policy.kv_heads
        return forecast_of(hidden, weight.to(hidden.dtype), kv_heads=kv_heads, rotary=rotary)

    @staticmethod
    def _wants(selection: BlockSelection | None) -> bool:
        return selection is not None and selection.scorer == "forecast"


def over_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    rule: Rule,
    *,
    forecast: Tensor | None = None,
) -> Tensor:
    """Attention of the last queries of a text to the blocks they choose, [rows, heads, Tq,
    head_dim]; forecast [rows, kv_heads, Tq, head_dim]."""
    forecast = None if forecast is None else forecast.to(k.device)
    blocks = choose_blocks(selection, q, k, scaling=rule.scaling, forecast=forecast)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.is_cuda and half and rule.softcap is None and rule.window is None:
        out: Tensor = block_attention(
            q, k, v, blocks, block_size=selection.block_size, scale=rule.scaling
        )
        return out
    length, heads = k.shape[2], q.shape[1]

    def attend(part: Tensor, behind: int) -> Tensor:
        stop = q.shape[2] - behind
        mine = blocks[:, :, stop - part.shape[2] : stop]
        mask = block_mask(mine, length, block_size=selection.block_size, behind=behind)
        mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
        if rule.window is not None:
            keys = torch.arange(length, device=k.device)
            own = keys[length - behind - part.shape[2] : length - behind]
            mask = mask & (own[:, None] - keys[None, :] < rule.window)
        return softmax_attention(part, k, v, mask, rule)

    return in_pieces(attend, q, heads * length)
