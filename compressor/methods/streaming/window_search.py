"""Perplexity of a frozen model under streaming windows with different numbers of sinks, all in one
sweep over its blocks."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from compressor.attention.rules.streaming import evaluated_by_slot, evaluated_by_text
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import Stream
from compressor.runner.sweep import Execution, Progress, sweep

LOGIT_ROWS = 512


def sink_perplexities(
    model: SourceModel,
    ids: Tensor,
    *,
    candidates: Sequence[int],
    window: int,
    slots: bool,
    batch: int,
    progress: Progress = lambda name, done, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[int | None, float]:
    """Number of sinks → perplexity over rows of ids [rows, length]; None is full attention.

    Only tokens that come when a window without sinks has already dropped the first ones count.
    Raises Interrupted when asked to stop.
    """
    execution = Execution(batch, stopping=stopping, progress=progress)
    streams: dict[int | None, Stream] = {}
    evaluated = evaluated_by_slot if slots else evaluated_by_text
    for step in sweep(model, ids, execution=execution):
        if not streams:
            streams = {None: step.stream, **{sinks: step.stream.copy() for sinks in candidates}}
        with step.loaded():
            for sinks, stream in streams.items():
                hook = None if sinks is None else partial(evaluated, sinks=sinks, window=window)
                step.run(stream, hook=hook)
    with model.logits() as logits:
        return {
            sinks: _perplexity(logits, stream.hidden, ids, first=window)
            for sinks, stream in streams.items()
        }


def _perplexity(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, *, first: int
) -> float:
    total, count = 0.0, 0
    for row, targets in zip(hidden[:, first:-1], ids[:, first + 1 :], strict=True):
        for part, wanted in zip(row.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logs = torch.log_softmax(logits(part).float(), dim=-1)
            chosen = logs.gather(1, wanted.to(logs.device)[:, None])
            total -= float(chosen.double().sum())
            count += len(wanted)
    return math.exp(min(total / count, 700.0))


def fewest_sinks(found: Mapping[int, float], *, tolerance: float) -> int:
    """The smallest number of sinks whose perplexity is within `tolerance` of the best one's."""
    best = min(found.values())
    return min(sinks for sinks, value in found.items() if value <= best * (1 + tolerance))
