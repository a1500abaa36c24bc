"""StreamingLLM (arXiv 2309.17453): every head sees a few first tokens, the sinks, and a recent
window, so that the cache never grows and perplexity stays where it was on texts of any length.

The window counts a query's own token: the published 4 + 1020 is `sinks: 4, window: 1021`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compressor.attention.policy import AttentionPolicy, check_policy
from compressor.attention.rules.streaming import streaming_policy
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import FrozenModel, LearnContext, Learned, ModelPass
from compressor.methods.common.head_plots import curves
from compressor.methods.streaming.window_search import fewest_sinks, sink_perplexities


class Streaming(ModelPass):
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

    @property
    def reads_tokens(self) -> bool:  # type: ignore[override]
        """Only to measure."""
        return self.sinks == "measured"

    def config_entries(self, layout: ModelLayout) -> Mapping[str, Any]:
        """Nothing; refuses, in `plan`, a model whose heads no such policy can describe."""
        if any(unit.attention is not None for unit in layout.units):
            check_policy(self._policy(layout, self._most_sinks, {}), layout)
        return {}

    def learn(self, model: FrozenModel, context: LearnContext) -> Learned:
        """The policy; measured sinks first, where they are asked for."""
        if isinstance(self.sinks, int):
            policy = self._policy(model.layout, self.sinks, {})
            return Learned(policy=policy.to_json(), rows=[{"name": "sinks", "sinks": self.sinks}])
        assert context.tokens is not None
        ids = context.tokens.ids
        if ids.shape[1] < 2 * self.window:
            raise InputError(
                f"streaming: rows of {ids.shape[1]} tokens are too short to see a window of "
                f"{self.window} at work",
                hint=f"calibration.length: {4 * self.window}",
            )
        found = sink_perplexities(
            model,
            ids,
            candidates=sorted(set(self.candidates)),
            window=self.window,
            slots=self.positions == "slot",
            batch=context.batch,
            progress=context.progress,
        )
        sinks = fewest_sinks(found, tolerance=self.tolerance)
        named = {"full" if k is None else str(k): round(v, 4) for k, v in found.items()}
        policy = self._policy(model.layout, sinks, {"perplexity": named})
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
        return Learned(
            policy=policy.to_json(),
            rows=[{"name": "sinks", "sinks": sinks, "perplexity": named}],
            plots={} if plot is None else {"streaming_sinks.png": plot},
        )

    def policy_again(
        self, layout: ModelLayout, stored: AttentionPolicy, values: Mapping[str, Tensor]
    ) -> AttentionPolicy:
        if isinstance(self.sinks, int):
            return self._policy(layout, self.sinks, {})
        measured = stored.made_by.get("streaming", {}).get("perplexity", {})
        tried: dict[int | None, float] = {
            int(k): float(v) for k, v in measured.items() if k != "full"
        }
        if set(tried) != set(self.candidates):
            raise InputError("the policy does not say what was measured with each number of sinks")
        return self._policy(layout, fewest_sinks(tried, tolerance=self.tolerance), {})

    def _policy(
        self, layout: ModelLayout, sinks: int, measured: Mapping[str, Any]
    ) -> AttentionPolicy:
        shape = next(unit.attention for unit in layout.units if unit.attention is not None)
        blocks = sum(unit.kind == "block" for unit in layout.units)
        return streaming_policy(
            layout,
            torch.ones(blocks, shape.kv_heads, dtype=torch.bool),
            sinks=sinks,
            window=self.window,
            positions=self.positions,
            made_by={"streaming": {"sinks": self.sinks, "window": self.window, **measured}},
        )


PASS = Streaming
