"""LServe's sparse decoding (arXiv 2502.14866): physical pages chosen by the bounds of logical ones.

A step reads `budget` keys in pages of 64, and the page that is being written. A page is worth what
its logical pages of 16 keys could score, so that large pages, which kernels and quantized caches
want, choose nearly as well as small ones: as released, what the best of them could, or what all of
them could together; and a text's first page, which holds what many heads attend to most, is read
as released for its score, or always: whichever keeps more of attention on the calibration text. A
choice lasts for `reuse` steps. Heads that another method lets stream (`duo_attention`,
`retrieval_heads`) keep their window; the rest choose pages. Nothing is trained and no weight
changes. With `mass` the budget is the smallest that keeps so much of attention on the calibration
text, with `page: null` a page is the largest that keeps nearly what flat pages of the logical size
would.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

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
Way = tuple[Weigh, int]
"""What a page is worth, and how many first ones are always read."""
PAGES = (64, 32, 16)
"""Sizes of physical pages that are tried, largest first."""
BEHIND = 0.02
"""Share of attention that flat pages of the logical size may keep more."""
LEAST = 3
"""Pages of a step at least."""


class Budget(Learned):
    """Keys of a step and of a page, what a page is worth, how many first ones are always read."""

    budget: int
    page: int
    weigh: Weigh = "max"
    first: int = 0


class LServe(ModelPass[Budget]):
    """Let decoding read pages of keys by bounds of smaller ones; changes no weight."""

    version: ClassVar[int] = 2

    page: int | None = Field(
        64,
        ge=1,
        description="keys of a physical page, which is read whole; null: the largest of 64, 32 and "
        "16 that keeps nearly what flat logical pages would",
    )
    logical: int = Field(16, ge=1, description="keys of a logical page, which is scored")
    budget: int = Field(4096, ge=1, description="keys of a step, in whole pages, at least three")
    mass: float | None = Field(
        None, gt=0, lt=1, description="share of attention to keep: the budget that does, up to this"
    )
    first: Literal[0, 1] | None = Field(
        None,
        description="whether a text's first page is always read, or as released for its score "
        "alone (0); by default what keeps more",
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
    def _pages_fit(self) -> Self:
        if (least := LEAST * self._pages[-1]) > self.budget:
            raise ValueError(f"a step reads at least {least} keys, budget is {self.budget}")
        for page in self._pages:
            _ = self._rule(self.budget, block_size=page)  # raises where pages do not divide
        return self

    @property
    def _pages(self) -> tuple[int, ...]:
        """Sizes of physical pages, largest first, that are tried."""
        if self.page is not None:
            return (self.page,)
        fit = (size for size in PAGES if size > self.logical and LEAST * size <= self.budget)
        return (*fit, self.logical)

    def _rule(self, budget: int, **changed: Any) -> LServePages:
        values = {
            "block_size": self._pages[0],
            "logical": self.logical,
            "reuse": self.reuse,
            "init_blocks": self.first or 0,
            **changed,
        }
        return LServePages(
            local_blocks=0,
            top_k=max(LEAST, budget // values["block_size"]),
            per=self.per,
            **values,
        )

    def needs(self) -> Needs:
        return Needs(tokens=True)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        yield from missing_layers(self.dense_layers, context.layout)
        page = self._pages[0]
        if context.length <= 4 * page:
            yield InputError(
                f"rows of {context.length} tokens are {context.length // page} pages of "
                f"{page}: too few to say what a choice of three keeps",
                hint=f"calibration: {{length: {16 * page}}}, or smaller pages",
            )

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        scores = 8.0 * context.rows * context.length**2
        return Cost(scores=scores, notes=(reads(self._rule(self.budget)),))

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Budget]:
        """Measure budgets, ways of weighing, and what logical pages are worth beside flat ones."""
        length, pages = context.ids.shape[1], self._pages
        budgets = [self.budget]
        if self.mass is not None:
            most = min(self.budget, length)
            budgets = [n * pages[0] for n in (4, 8, 16, 32, 64, 128) if n * pages[0] < most]
            budgets.append(self.budget)
        ways: list[Way] = [
            (weigh, first)
            for weigh in (("max", "sum") if self.weigh is None else (self.weigh,))
            for first in ((0, 1) if self.first is None else (self.first,))
        ]

        def with_logical(page: int, way: Way) -> str:
            first = " and the first" if way[1] else ""
            return f"pages of {page} with logical ones{first}, {way[0]}"

        def reused(page: int, way: Way) -> str:
            return f"{with_logical(page, way)}, for {self.reuse} steps"

        kinds: dict[str, dict[str, Any]] = {}
        for page in pages:
            for way in ways:
                own = {"block_size": page, "weigh": way[0], "init_blocks": way[1]}
                kinds |= {with_logical(page, way): {**own, "reuse": 1}, reused(page, way): own}
        for size in dict.fromkeys((*pages, self.logical)):
            flat = {"block_size": size, "logical": size, "reuse": 1, "init_blocks": 0}
            kinds[f"flat pages of {size}"] = flat
        cases = [(budget, name) for budget in budgets for name in kinds]
        policies = [
            rule_policy(model.layout, self._rule(budget, **kinds[name]), made_by={})
            for budget, name in cases
        ]
        found = measure_policies(model, policies, context.ids, progress=context.progress)
        kept = {case: float(one.mass.mean()) for case, one in zip(cases, found, strict=True)}
        least = {case: float(one.mass.min()) for case, one in zip(cases, found, strict=True)}
        enough = kept[self.budget, f"flat pages of {self.logical}"] - BEHIND
        near = [
            page
            for page in pages
            if max(kept[self.budget, with_logical(page, way)] for way in ways) >= enough
        ]
        page = near[0] if near else pages[-1]
        best = max(ways, key=lambda way: kept[self.budget, reused(page, way)])
        name = reused(page, best)
        full = [b for b in budgets if self.mass is not None and kept[b, name] >= self.mass]
        budget = full[0] if full else self.budget
        rows = [
            {
                "name": name,
                "budget": budget,
                "attention kept": kept[budget, name],
                "by the worst head": least[budget, name],
            }
            for budget, name in cases
        ]
        chosen = found[cases.index((budget, name))]
        plot = heat_map(chosen.mass, title="Attention kept by LServe's pages", across="query head")
        return LearnResult(
            Budget(budget=budget, page=page, weigh=best[0], first=best[1]),
            rows=rows,
            plots={} if plot is None else {"lserve.png": plot},
        )

    def policy(self, layout: ModelLayout, learned: Budget | None) -> AttentionPolicy:
        chosen = learned or Budget(
            budget=self.budget,
            page=self._pages[0],
            weigh=self.weigh or "max",
            first=self.first or 0,
        )
        return rule_policy(
            layout,
            self._rule(
                chosen.budget,
                block_size=chosen.page,
                weigh=chosen.weigh,
                init_blocks=chosen.first,
            ),
            made_by={"lserve": {**self.parameters, **chosen.figures()}},
            dense=self.dense_layers,
        )
