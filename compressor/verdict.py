"""What is found out about a finished checkpoint by reopening its files: verify, evaluate, gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compressor.compile import Compiled, Prepared
from compressor.evaluate import EvaluationResult, evaluate
from compressor.source import open_source
from compressor.streaming import Progress
from compressor.verify import VerifyReport, verify


@dataclass(frozen=True, slots=True)
class Verdict:
    """The findings; None for what the recipe does not ask for."""

    verified: VerifyReport | None
    evaluation: EvaluationResult | None

    @property
    def ok(self) -> bool:
        """Nothing that was checked failed."""
        return self.verified is None or self.verified.ok

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "verify": None if self.verified is None else self.verified.to_json(),
            "evaluate": None if self.evaluation is None else self.evaluation.to_json(),
        }


def judge(prepared: Prepared, compiled: Compiled, *, progress: Progress | None = None) -> Verdict:
    """Check and measure the written files as the recipe says."""
    recipe, source = prepared.recipe, prepared.located.source
    verified = evaluation = None
    if recipe.verify:
        verified = verify(
            compiled.output,
            against=source.checkpoint.folder,
            device=prepared.device,
            seed=recipe.seed,
            progress=progress,
        )
    damaged = verified is not None and not verified.ok
    if prepared.evaluation is not None and recipe.evaluate is not None and not damaged:
        evaluation = evaluate(
            open_source(compiled.output),
            prepared.evaluation.ids,
            device=prepared.device,
            dtype=prepared.plan.compute_dtype(prepared.device),
            against=source if recipe.evaluate.against_original else None,
            batch=prepared.batch,
            progress=progress,
        )
    if prepared.device.type == "cuda":
        torch.cuda.empty_cache()
    return Verdict(verified=verified, evaluation=evaluation)
