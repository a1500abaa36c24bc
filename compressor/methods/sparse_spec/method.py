"""SparseSpec (arXiv 2512.01278): a model drafts for itself over the keys that matter, and verifies.

Drafts read the keys that the last verification attended to most; a verification reads all and is
exact, so what is generated does not change. Nothing is trained, no weight changes, and no second
model is there. What can be known beforehand is how many drafts would be kept: measured on the
calibration text, teacher-forced, by budget and stride.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import torch
from pydantic import Field

from compressor.attention.policy import AttentionPolicy, rule_policy
from compressor.attention.rules.pillar import Pillar
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import Cost, ModelPass, Needs
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.learned import Learned
from compressor.methods.sparse_spec.acceptance import measure_acceptance
from compressor.runner.source_model import SourceModel

FILE_NAME = "acceptance.json"


class SparseSpec(ModelPass[Learned]):
    """Let drafts read the keys that verification attended to most; changes no weight."""

    stride: int = Field(8, ge=1, le=32, description="tokens that are drafted in a row")
    ratio: float = Field(0.05, gt=0, le=1, description="share of all keys that a draft reads")
    min_budget: int = Field(128, ge=1, description="keys that it reads at least")
    tried: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.025, 0.05, 0.1), description="ratios that are measured beside the one that is written"
    )
    rows: int = Field(2, ge=1, description="rows of calibration tokens that are measured")

    def _rule(self, ratio: float, stride: int) -> Pillar:
        return Pillar(stride=stride, ratio=ratio, min_budget=self.min_budget)

    def needs(self) -> Needs:
        return Needs(tokens=True)

    @property
    def records_quality(self) -> bool:
        """What drafts read changes how many are kept, and nothing that is generated."""
        return False

    def check(self, context: PlanContext) -> Iterator[InputError]:
        half = context.length // 2
        if half <= self.min_budget or half < 2 * (self.stride + 1):
            yield InputError(
                f"rows of {context.length} tokens say nothing of drafts over {self.min_budget} "
                "keys: half a row would be read whole",
                hint=f"calibration: {{length: {8 * self.min_budget}}}, or a smaller min_budget",
            )

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        rows = min(self.rows, context.rows)
        scores = 2.0 * (1 + len(self.tried)) * rows * context.length**2
        note = f"drafts of {self.stride} tokens over {self.ratio:.0%} of the keys"
        return Cost(scores=scores, notes=(note,))

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Learned]:
        ratios = sorted({*self.tried, self.ratio})
        strides = sorted({max(1, self.stride // 2), self.stride})
        settings = [self._rule(ratio, stride) for ratio in ratios for stride in strides]
        found = measure_acceptance(
            model, context.ids[: self.rows], settings, progress=context.progress
        )
        rows: list[dict[str, Any]] = [
            {
                "name": f"{one.rule.ratio:.1%} of the keys, {one.rule.stride} drafts",
                "drafts kept": one.kept,
                "drafts kept, greedy": one.greedy,
                "keys read": one.read,
                "attention read": sum(one.mass) / len(one.mass),
            }
            for one in found
        ]
        table = [{**asdict(one), "rule": one.rule.to_json()} for one in found]
        content = (json.dumps({"version": 1, "settings": table}, indent=1) + "\n").encode()
        return LearnResult(Learned(), rows=rows, files={FILE_NAME: content})

    def policy(self, layout: ModelLayout, learned: Learned | None) -> AttentionPolicy:
        made_by = {"sparse_spec": self.parameters}
        return rule_policy(layout, self._rule(self.ratio, self.stride), made_by=made_by)
