"""LServe's sparse decoding (arXiv 2502.14866): physical pages chosen by the bounds of logical ones.

A step reads `budget` keys in pages of 64, and the page that is being written. A page is worth what
its logical pages of 16 keys could score, so that large pages, which kernels and quantized caches
want, choose nearly as well as small ones: as released, what the best of them could, or what all of
them could together, whichever keeps more of attention on the calibration text. A choice lasts for
`reuse` steps. Heads that another method lets stream (`duo_attention`, `retrieval_heads`) keep their
window; the rest choose pages. Nothing is trained and no weight changes; with `mass` the budget is
the smallest that keeps so much of attention on the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from compressor.attention.policy import AttentionPolicy, rule_policy
from compressor.attention.quality import measure_policies
from compressor.attention.rules.lserve import LServePages
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import Cost, ModelPass, Needs
from compressor.methods.common.chosen_blocks import reads
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.dense_layers import Layers, missing_layers
from compressor.methods.common.head_plots import heat_map
from compressor.methods.common.learned import Learned
from compressor.runner.source_model import SourceModel

Weigh = Literal["max", "sum"]


class Budget(Learned):
    """Keys of a step, and what a page is worth."""

    budget: int
    weigh: Weigh = "max"


class LServe(ModelPass[Budget]):
    """Let decoding read pages of keys by bounds of smaller ones; changes no weight."""

    version: ClassVar[int] = 1

    page: int = Field(64, ge=1, description="keys of a physical page, which is read whole")
    logical: int = Field(16, ge=1, description="keys of a logical page, which is scored")
    budget: int = Field(4096, ge=1, description="keys of a step, in whole pages, at least three")
    mass: float | None = Field(
        None, gt=0, lt=1, description="share of attention to keep: the budget that does, up to this"
    )
    reuse: int = Field(4, ge=1, description="steps from one choice to the next")
    weigh: Weigh | None = Field(
        None,
        description="what a page is worth: its best logical page, as released, or all of them; "
        "by default what keeps more",
    )
    per: Literal["query_head", "kv_head"] = Field(
        "query_head",
        description="a choice for each query head, as released, or one for those of a KV head",
    )
    dense_layers: Layers = Field((), description="layers that attend to everything")

    @model_validator(mode="after")
    def _pages_fit(self) -> LServe:
        _ = self._rule(self.budget)  # raises where pages do not divide
        return self

    def _rule(self, budget: int, **changed: Any) -> LServePages:
        values = {
            "block_size": self.page,
            "logical": self.logical,
            "reuse": self.reuse,
            **changed,
        }
        return LServePages(
            init_blocks=0,
            local_blocks=0,
            top_k=max(3, budget // values["block_size"]),
            per=self.per,
            **values,
        )

    def needs(self) -> Needs:
        return Needs(tokens=True)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        yield from missing_layers(self.dense_layers, context.layout)
        if context.length <= 4 * self.page:
            yield InputError(
                f"rows of {context.length} tokens are {context.length // self.page} pages of "
                f"{self.page}: too few to say what a choice of three keeps",
                hint=f"calibration: {{length: {16 * self.page}}}, or smaller pages",
            )

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        scores = 8.0 * context.rows * context.length**2
        return Cost(scores=scores, notes=(reads(self._rule(self.budget)),))

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Budget]:
        """Measure budgets, ways of weighing, and what logical pages are worth beside flat ones."""
        length = context.ids.shape[1]
        budgets = [self.budget]
        if self.mass is not None:
            most = min(self.budget, length)
            budgets = [n * self.page for n in (4, 8, 16, 32, 64, 128) if n * self.page < most]
            budgets.append(self.budget)
        flat = {"block_size": self.page, "logical": self.page}
        small = {"block_size": self.logical, "logical": self.logical, "reuse": 1}
        ways: tuple[Weigh, ...] = ("max", "sum") if self.weigh is None else (self.weigh,)
        kinds: dict[str, dict[str, Any]] = {
            **{f"physical and logical pages, {way}": {"reuse": 1, "weigh": way} for way in ways},
            **{f"{way}, with a choice for {self.reuse} steps": {"weigh": way} for way in ways},
            f"flat pages of {self.page}": {**flat, "reuse": 1},
            f"flat pages of {self.logical}": small,
        }
        cases = [(budget, name) for budget in budgets for name in kinds]
        policies = [
            rule_policy(model.layout, self._rule(budget, **kinds[name]), made_by={})
            for budget, name in cases
        ]
        found = measure_policies(model, policies, context.ids, progress=context.progress)
        kept = {case: float(one.mass.mean()) for case, one in zip(cases, found, strict=True)}
        least = {case: float(one.mass.min()) for case, one in zip(cases, found, strict=True)}
        after = f"with a choice for {self.reuse} steps"
        weigh = max(ways, key=lambda way: kept[self.budget, f"{way}, {after}"])
        own = f"{weigh}, {after}"
        enough = [b for b in budgets if self.mass is not None and kept[b, own] >= self.mass]
        rows = [
            {
                "name": name,
                "budget": budget,
                "attention kept": kept[budget, name],
                "by the worst head": least[budget, name],
            }
            for budget, name in cases
        ]
        budget = enough[0] if enough else self.budget
        chosen = found[cases.index((budget, own))]
        plot = heat_map(chosen.mass, title="Attention kept by LServe's pages", across="query head")
        return LearnResult(
            Budget(budget=budget, weigh=weigh),
            rows=rows,
            plots={} if plot is None else {"lserve.png": plot},
        )

    def policy(self, layout: ModelLayout, learned: Budget | None) -> AttentionPolicy:
        chosen = learned or Budget(budget=self.budget, weigh=self.weigh or "max")
        about = self.model_dump(mode="json", exclude={"targets", "ignore"})
        return rule_policy(
            layout,
            self._rule(chosen.budget, weigh=chosen.weigh),
            made_by={"lserve": {**about, **chosen.figures()}},
            dense=self.dense_layers,
        )


PASS = LServe
