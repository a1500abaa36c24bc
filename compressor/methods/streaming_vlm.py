"""StreamingVLM (arXiv 2510.09608): which tokens a vision-language model keeps of an endless video.

The cache holds text sinks, a long text tail, and the clips of the last rounds, at contiguous
positions. No weight changes; the sizes are written beside the weights as `stream_policy.json`, from
which `compressor.attention.serve.stream` runs the model. The published model was tuned to it; what
it is worth on one that was not is not known.
"""

import json
from collections.abc import Iterator
from typing import Self

import torch
from pydantic import Field, model_validator

from compressor.attention.token_classes import FAMILIES, POLICY_NAME, StreamSizes
from compressor.errors import InputError
from compressor.methods.base import OF_METHODS, Cost, ModelPass
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.learned import Learned
from compressor.runner.source_model import SourceModel

CLIP_TOKENS, TEXT_TOKENS = 100, 30
"""Of a round, as published: at least so many of its clip, about so many of its text."""


class StreamingVLM(ModelPass[Learned]):
    """Declare which tokens of an endless video stay in the cache; changes no weight."""

    sink: int | None = Field(512, ge=0, description="first tokens of the previous text that stay")
    window: int | None = Field(
        512, ge=2, description="its last ones, one less; both null: all of it stays"
    )
    text_rounds: int = Field(16, ge=1, description="rounds whose text stays in place")
    vision_rounds: int = Field(16, ge=1, description="rounds whose clip stays")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        try:
            _ = self.sizes
        except InputError as error:
            raise ValueError(error.message) from error
        return self

    @property
    def sizes(self) -> StreamSizes:
        """What stays."""
        return StreamSizes(**self.model_dump(exclude=OF_METHODS))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        family = context.config.get("model_type")
        if family not in FAMILIES:
            yield InputError(
                f"a video stream runs {' and '.join(FAMILIES)}, not {family}",
                hint="streaming: {…} keeps sinks and a window of any text model",
            )

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        text = (self.sink or 0) + (self.window or 0)
        kept = text + self.text_rounds * TEXT_TOKENS + self.vision_rounds * CLIP_TOKENS
        shapes = [unit.attention for unit in context.layout.blocks if unit.attention]
        channels = sum(shape.kv_heads * shape.head_dim for shape in shapes)
        size = kept * channels * 2 * dtype.itemsize / 2**20
        note = f"a stream keeps some {kept:,} tokens, {size:,.0f} MiB"
        return Cost(notes=(note,))

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Learned]:
        data = {"version": 1, "positions": "contiguous", **self.sizes.to_json()}
        return LearnResult(
            Learned(), files={POLICY_NAME: (json.dumps(data, indent=1) + "\n").encode()}
        )
