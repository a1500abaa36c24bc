"""StreamingLLM (arXiv 2309.17453): every head sees a few first tokens, the sinks, and a recent
window, so that the cache never grows and perplexity stays where it was on texts of any length.

The window counts a query's own token: the published 4 + 1020 is `sinks: 4, window: 1021`.
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from compressor.attention.policy import AttentionPolicy, attention_shape
from compressor.attention.rules.streaming import streaming_policy
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import ModelPass, Needs
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.head_plots import curves
from compressor.methods.common.learned import Learned
from compressor.methods.streaming.window_search import fewest_sinks, sink_perplexities
from compressor.runner.source_model import SourceModel


class Measured(Learned):
    """Perplexity by number of sinks, and of `full` attention; nothing where none was measured."""

    perplexity: dict[str, float] = Field(default_factory=dict)


class Streaming(ModelPass[Measured]):
    """Let every head attend to sinks and a recent window only; weights stay as they are.

    What leaves the window is gone: texts of any length stay fluent, but nothing is recalled from
    before. With `sinks: measured` the calibration tokens decide how many sinks are needed.
    """

    sinks: int | Literal["measured"] = Field(4, description="first tokens that are always seen")
    window: int = Field(1024, ge=1, description="recent tokens, the query's own included")
    positions: Literal["slot", "text"] = Field(
        "slot", description="a token's position: its place in the cache (published) or in the text"
    )
    candidates: tuple[int, ...] = Field(
        (0, 1, 2, 4, 8), min_length=2, description="measured: numbers of sinks to try"
    )
    tolerance: float = Field(
        0.01, ge=0, description="measured: perplexity above the best that fewer sinks may cost"
    )

    @field_validator("sinks")
    @classmethod
    def _is_a_number(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("sinks are not negative")
        return value

    @model_validator(mode="after")
    def _window_holds_sinks(self) -> Self:
        if self._most_sinks >= self.window:
            raise ValueError(
                f"{self._most_sinks} sinks are not fewer than the window of {self.window}"
            )
        return self

    @property
    def _most_sinks(self) -> int:
        return self.sinks if isinstance(self.sinks, int) else max(self.candidates)

    def needs(self) -> Needs:
        return Needs(tokens=self.sinks == "measured")

    def check(self, context: PlanContext) -> Iterator[InputError]:
        if self.sinks == "measured" and context.length < 2 * self.window:
            yield InputError(
                f"rows of {context.length} tokens are too short to see a window of {self.window} "
                "at work",
                hint=f"calibration.length: {4 * self.window}",
            )

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Measured]:
        """How many sinks are needed, where that is to be measured."""
        if isinstance(self.sinks, int):
            return LearnResult(Measured(), rows=[{"name": "sinks", "sinks": self.sinks}])
        found = sink_perplexities(
            model,
            context.ids,
            candidates=sorted(set(self.candidates)),
            window=self.window,
            slots=self.positions == "slot",
            batch=context.batch,
            progress=context.progress,
            stopping=context.stopping,
        )
        value = Measured(
            perplexity={"full" if k is None else str(k): round(v, 4) for k, v in found.items()}
        )
        points = [(float(k), v) for k, v in found.items() if k is not None]
        most = points[-1][0]
        plot = curves(
            {
                f"{self.window} recent": points,
                "full attention": [(0.0, found[None]), (most, found[None])],
            },
            title="Perplexity by number of sinks",
            x="sinks",
            y="perplexity",
            log=True,
        )
        return LearnResult(
            value,
            rows=[{"name": "sinks", "sinks": self._enough(value), **value.figures()}],
            plots={} if plot is None else {"streaming_sinks.png": plot},
        )

    def policy(self, layout: ModelLayout, learned: Measured | None) -> AttentionPolicy:
        found = {} if learned is None or isinstance(self.sinks, int) else learned.figures()
        about = {"sinks": self.sinks, "window": self.window, **found}
        return streaming_policy(
            layout,
            torch.ones(len(layout.blocks), attention_shape(layout).kv_heads, dtype=torch.bool),
            sinks=self._most_sinks if learned is None else self._enough(learned),
            window=self.window,
            positions=self.positions,
            made_by={"streaming": about},
        )

    def _enough(self, found: Measured) -> int:
        """The sinks of the recipe, or the fewest that will do."""
        if isinstance(self.sinks, int):
            return self.sinks
        tried = {int(k): v for k, v in found.perplexity.items() if k != "full"}
        if set(tried) != set(self.candidates):
            raise InputError("the policy does not say what was measured with each number of sinks")
        return fewest_sinks(tried, tolerance=self.tolerance)
