"""Perplexity of a frozen model under streaming windows with different numbers of sinks, all in one
sweep over its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from compressor.attention.masked import both_masks
from compressor.attention.rules.streaming import evaluated_by_slot, token_mask
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.source_model import SourceModel

LOGIT_ROWS = 512


def sink_perplexities(
    model: SourceModel,
    ids: Tensor,
    *,
    candidates: Sequence[int],
    window: int,
    slots: bool,
    batch: int,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[int | None, float]:
    """Number of sinks → perplexity over rows of ids [rows, length]; None is full attention.

    Only tokens that come when a window without sinks has already dropped the first ones count.
    """
    layout = model.layout
    start = model.runner.embed(model.tensors(0), ids, batch=batch).to("cpu", torch.float32)
    kinds: list[int | None] = [None, *candidates]
    states = {kind: start.clone() for kind in kinds}
    blocks = [unit for unit in layout.units if unit.kind == "block"]
    for number, unit in enumerate(blocks):
        with model.runner.block(unit, model.tensors(number + 1)) as block:
            for kind in kinds:
                hook = None if kind is None else _hook(kind, window, slots=slots)
                with model.runner.attention(hook):
                    block.forward_rows(states[kind], batch=batch, out=states[kind])
        progress(unit.name, number + 1, len(blocks))
    last = len(layout.units) - 1
    tensors = model.tensors(last)
    (linear,) = (x for x in layout.head.linears if x.role == "lm_head")
    weight = model.tensors(0)[layout.tied] if layout.tied else tensors[linear.weight_name]
    with model.runner.head(tensors, weight) as logits:
        return {kind: _perplexity(logits, states[kind], ids, first=window) for kind in kinds}


def _hook(sinks: int, window: int, *, slots: bool) -> AttentionHook:
    if slots:
        return partial(evaluated_by_slot, sinks=sinks, window=window)

    def hook(call: AttentionCall) -> Tensor:
        place = torch.arange(call.key.shape[2], device=call.key.device)
        mask = token_mask(place, place, sinks=sinks, window=window)[None, None]
        return call.plain(call.query, call.key, call.value, both_masks(call.mask, mask))

    return hook


def _perplexity(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, *, first: int
) -> float:
    total, count = 0.0, 0
    for row, targets in zip(hidden[:, first:-1], ids[:, first + 1 :], strict=True):
        for part, wanted in zip(row.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logs = torch.log_softmax(logits(part[None])[0].float(), dim=-1)
            chosen = logs.gather(1, wanted.to(logs.device)[:, None])
            total -= float(chosen.double().sum())
            count += len(wanted)
    return math.exp(min(total / count, 700.0))


def fewest_sinks(found: Mapping[int, float], *, tolerance: float) -> int:
    """The smallest number of sinks whose perplexity is within `tolerance` of the best one's."""
    best = min(found.values())
    return min(sinks for sinks, value in found.items() if value <= best * (1 + tolerance))
