"""Which of more windows than are needed a recipe is calibrated on: `calibration.select`.

A candidate is a long window of which the row is the end. Its last tokens are scored three times:
after a few tokens, after the row, and after all of it. What was chosen is kept in the work folder,
so that a run that goes on elsewhere goes on with the same rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressor_calibration.tokens import TokenSet, token_set
from torch import Tensor

from compressor.checkpoint.records import Records
from compressor.evaluate.perplexity import token_scores
from compressor.numerics.sufficiency import most_decided, sufficiency
from compressor.plan.calibration import Sufficiency
from compressor.plan.plan import Plan
from compressor.run.settings import JobSettings
from compressor.runner.sweep import StreamedModel, run_blocks

NAME = "selection.json"


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows that were taken, and what the report says of them."""

    tokens: TokenSet
    row: Mapping[str, Any]


def select_rows(
    plan: Plan, candidates: TokenSet, kept: Records, settings: JobSettings
) -> Selection | None:
    """The rows of candidates [windows, reference length] that a recipe is to be calibrated on; None
    where it takes all of them.

    Raises Interrupted when asked to stop, MachineError where memory fails.
    """
    wanted = plan.recipe.calibration.select
    if wanted is None:
        return None
    known = kept.get(NAME)
    if known is None:
        known = _looked_at(plan, wanted.sufficiency, candidates, settings)
        kept.put(NAME, known)
    length = plan.recipe.calibration.length
    ids = _end(candidates.ids, length)[known["rows"]]
    tokens = token_set(ids, like=candidates, sampling=f"{candidates.sampling}, by sufficiency")
    return Selection(tokens, known["row"])


def _looked_at(
    plan: Plan, wanted: Sufficiency, candidates: TokenSet, settings: JobSettings
) -> dict[str, Any]:
    length = plan.recipe.calibration.length
    losses = [
        _losses(plan, _end(candidates.ids, tokens), wanted.scored, settings)
        for tokens in (wanted.context + wanted.scored, length, candidates.ids.shape[1])
    ]
    few, own, all_of_it = losses
    gain, shares = few - own, sufficiency(few - own, few - all_of_it)
    rows = most_decided(gain, shares, count=plan.recipe.calibration.samples, least=wanted.min)
    return {
        "rows": rows.tolist(),
        "row": {
            "pass": "calibration.select",
            "name": "sufficiency",
            "windows": len(gain),
            "taken": len(rows),
            "sufficiency": float(shares.mean()),
            "sufficiency_taken": float(shares[rows].mean()),
            "nats_of_context": float(gain.mean()),
            "nats_of_context_taken": float(gain[rows].mean()),
            "enough": int((shares >= wanted.min).sum()),
        },
    }


def _end(ids: Tensor, length: int) -> Tensor:
    """The last `length` tokens of each row, after the BOS that all rows begin with."""
    first = ids[:, :1]
    if len(ids) > 1 and bool((first == first[0]).all()) and length < ids.shape[1]:
        return torch.cat([first, ids[:, ids.shape[1] - length + 1 :]], dim=1)
    return ids[:, ids.shape[1] - length :]


def _losses(plan: Plan, ids: Tensor, scored: int, settings: JobSettings) -> Tensor:
    """Mean negative log-likelihood of each row's last tokens, float64 [rows]."""
    calibration = plan.recipe.calibration

    def progress(name: str, done: int, total: int) -> None:
        settings.check_stop()
        settings.on_step(f"windows of {ids.shape[1]} tokens, {name}", done, total)

    streams = run_blocks(
        [StreamedModel(plan.source, activations=settings.activations)],
        ids,
        device=settings.device,
        dtype=plan.compute_dtype(settings.device),
        batch=max(1, settings.batch * calibration.length // ids.shape[1]),
        progress=progress,
    )
    counted = torch.zeros_like(ids[:, 1:], dtype=torch.bool)
    counted[:, -scored:] = True
    nll, _, _, _ = token_scores(streams, ids, counted)
    return nll.sum(1) / scored
