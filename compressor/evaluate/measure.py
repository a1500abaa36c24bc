"""Everything that is measured of a checkpoint: perplexity beside the original, the retrieval of a
hidden sentence, tasks of the harness."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.source import Source
from compressor.evaluate.passkey import PasskeyResult, passkey
from compressor.evaluate.perplexity import EvaluationResult, TaskScore, evaluate, strided
from compressor.evaluate.settings import Evaluation
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.activations import Activations
from compressor.runner.sweep import Progress


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found; None, or empty, for what was not asked for."""

    evaluation: EvaluationResult
    passkey: PasskeyResult | None = None
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)


def measure(
    source: Source,
    tokenizer: Any,
    ids: Tensor,
    wanted: Evaluation,
    *,
    haystack: str,
    device: torch.device,
    dtype: torch.dtype,
    batch: Callable[[int], int],
    stage: Callable[[str], AbstractContextManager[None]],
    against: Source | None = None,
    activations: Activations | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Measured:
    """Measure what `wanted` says on its tokens [windows, length].

    haystack     text that the passkey is hidden in
    batch        rows of so many tokens in one forward pass
    stage        a context of each part, by name
    against      the original;  activations  where its hidden states are kept
    seed         of the harness
    Raises InputError for tokens, a haystack or tasks that cannot be used, ImportError for tasks
    where the harness is not installed.
    """
    run: dict[str, Any] = {"device": device, "dtype": dtype, "progress": progress, "ranks": ranks}
    beside: dict[str, Any] = {"against": against, "activations": activations}
    scored, retrieved, answered = None, None, {}
    if wanted.stride is not None:
        ids, scored = strided(ids.reshape(-1), length=wanted.length, stride=wanted.stride)
    with stage("evaluate"):
        found = evaluate(source, ids, scored=scored, batch=batch(wanted.length), **beside, **run)
    if (probe := wanted.passkey) is not None:
        rows = batch(max(probe.lengths))
        with stage("passkey"):
            retrieved = passkey(
                source, tokenizer, haystack=haystack, task=probe, batch=rows, **beside, **run
            )
    if wanted.tasks:
        # The harness is an extra.
        from compressor.evaluate.harness import StreamedLM, run_tasks

        with stage("tasks"):
            model = StreamedLM(source, tokenizer, batch=batch(wanted.length), **run)
            answered = run_tasks(model, wanted.tasks, limit=wanted.task_limit, seed=seed)
    return Measured(found, retrieved, answered)
