"""Attention under a stored policy, as evaluations run it: a hook for each block.

The whole text is one pass, masked by the policy's token mask, so every position sees exactly the
keys that a decoding step over the small cache would have kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.attention.block_evaluation import BlockAttending
from compressor.attention.policy import (
    AttentionPolicy,
    LayerPolicy,
    check_policy,
    layer_mask,
    read_policy,
)
from compressor.attention.rope import rotated_back
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.unit import Unit
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.sweep import Attending, StreamedModel


def as_stored(source: Source, attention: Attending | None = None) -> StreamedModel:
    """A checkpoint for one run over it, attending as is said or else as the policy in its folder
    says. Raises InputError for a policy that is not valid, or not for this model."""
    folder = source.checkpoint.folder
    policy = read_policy(folder) if attention is None and folder.is_dir() else None
    if policy is None:
        return StreamedModel(source, attention)
    check_policy(policy, source.layout)
    return StreamedModel(source, policy_attention(policy))


def policy_attention(policy: AttentionPolicy) -> Attending:
    """How blocks attend under a policy, in one run over a model."""
    blocks = BlockAttending(policy)

    def of_block(unit: Unit) -> AttentionHook | None:
        layer = policy.layers[unit.layout.index]
        choosing = blocks.hook(unit)
        if choosing is not None:
            return choosing
        if layer.streaming is None:
            return None
        if policy.positions == "slot":
            return by_slot(sinks=layer.streaming.sinks, window=layer.streaming.window)
        return _by_text(layer)

    return of_block


def _by_text(layer: LayerPolicy) -> AttentionHook:
    def hook(call: AttentionCall) -> Tensor:
        place = torch.arange(call.key.shape[2], device=call.key.device)
        kv_heads = call.key.shape[1]
        mask = layer_mask(layer, kv_heads=kv_heads, queries=place, keys=place)
        mask = mask.repeat_interleave(call.query.shape[1] // kv_heads, dim=0)
        return call.plain(call.query, call.key, call.value, restricted(call, mask[None]))

    return hook


def by_slot(*, sinks: int, window: int) -> AttentionHook:
    """Every head streaming, positions by cache slot.

    Between recent tokens slots are as far apart as places in the text. A sink is nearer than in
    the text by what was evicted between, so the sinks appear a second time, in channels of their
    own, for a query that is rotated back by as much: one softmax, and the model's own attention.
    """

    def hook(call: AttentionCall) -> Tensor:
        if call.rotary is None:
            raise InputError("slot positions need a rotary embedding, which this model has not")
        length = call.key.shape[2]
        place = torch.arange(length, device=call.key.device)
        distance = place[:, None] - place[None, :]
        first = min(sinks, length)
        recent = (distance >= 0) & (distance < window) & (place >= sinks)[None, :]
        mask = torch.cat([recent, distance[:, :first] >= 0], dim=1)
        evicted = (place - (sinks + window - 1)).clamp(min=0)
        far = rotated_back(call.query, evicted, call.rotary)
        query = torch.cat([call.query, far], dim=-1)
        key = torch.cat(
            [
                torch.nn.functional.pad(call.key, (0, call.key.shape[3])),
                torch.nn.functional.pad(call.key[:, :, :first], (call.key.shape[3], 0)),
            ],
            dim=2,
        )
        value = torch.cat([call.value, call.value[:, :, :first]], dim=2)
        own = None if call.mask is None else _extended(call.mask, first)
        return call.plain(query, key, value, _masked(own, mask[None, None]))

    return hook


def restricted(call: AttentionCall, mask: Tensor) -> Tensor:
    """The model's own mask and `mask` [rows or 1, heads, length, keys] together."""
    return _masked(call.mask, mask)


def _masked(own: Tensor | None, mask: Tensor) -> Tensor:
    if own is None:
        return mask
    if own.dtype == torch.bool:
        return own & mask
    return own.masked_fill(~mask, torch.finfo(own.dtype).min)


def _extended(own: Tensor, first: int) -> Tensor:
    """A model's mask with the first keys' columns repeated at its end."""
    return torch.cat([own, own[..., :first]], dim=-1)
