"""Retrieval heads (arXiv 2404.15574): which heads copy from far back, by their copy scores.

Scores come from passkey rows under teacher forcing, block by block with one unit in memory, where
the reference decodes and looks at whole models. A KV head takes the highest score of its query
heads; the reference leaves that open.
"""

import json
import random
from collections.abc import Iterator
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.policy import AttentionPolicy, attention_shape
from compressor.attention.rules.streaming import streaming_policy
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import ModelPass, Needs
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.copy_scores import CopyScores, copy_scores, of_kv_heads
from compressor.methods.common.head_plots import heat_map
from compressor.methods.common.learned import Learned, of_shape
from compressor.methods.common.needles import Needles, make_row, too_long
from compressor.numerics.head_gates import keep_full
from compressor.runner.source_model import SourceModel

SCORES_NAME = "retrieval_heads.json"


class Scores(Learned):
    """Mean copy scores [layers, heads], over those of all `answers` that the model gave."""

    scores: Tensor
    accepted: int
    answers: int


class RetrievalHeads(ModelPass[Scores]):
    """Score query heads by how often they copy a hidden passkey; with `share`, let the KV heads
    that copy least stream.

    The haystack is the calibration text. Writes scores, a heat map, and an attention policy.
    """

    data: Needles = Field(
        Needles(keys=4, words=8, max_length=2048, lengths=4), description="the passkey rows"
    )
    rows: int = Field(8, ge=1, description="rows for each length")
    share: float | None = Field(
        None, ge=0, le=1, description="share of all KV heads that stream; null: only score"
    )
    sinks: int = Field(64, ge=0, description="first tokens a streaming head sees")
    window: int = Field(256, ge=1, description="recent tokens it sees, its own included")

    @model_validator(mode="after")
    def _window_holds_sinks(self) -> Self:
        if self.sinks >= self.window:
            raise ValueError(f"{self.sinks} sinks are not fewer than the window of {self.window}")
        return self

    def needs(self) -> Needs:
        return Needs(tokens=True)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        return too_long(self.data, context.layout)

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Scores]:
        """Score all heads at every length."""
        haystack = context.ids.flatten().tolist()
        encode = model.tokenizer()
        found: list[CopyScores] = []
        for length in self.data.row_lengths:
            draw = random.Random(f"{context.seed} {length}")
            rows = [
                make_row(encode, haystack, data=self.data, length=length, draw=draw)
                for _ in range(self.rows)
            ]
            scored = copy_scores(
                model,
                rows,
                batch=context.batch,
                progress=context.progress,
                stopping=context.stopping,
            )
            found.append(scored)
        answers = torch.cat([part.per_answer for part in found], dim=1)
        whole = CopyScores(per_answer=answers, answers=sum(part.answers for part in found))
        value = Scores(scores=whole.scores, accepted=whole.accepted, answers=whole.answers)
        plot = heat_map(value.scores, title="Copy scores", across="query head")
        return LearnResult(
            value,
            rows=[{"name": "copy scores", **_ranking(value.scores), **self._about(value)}],
            files={SCORES_NAME: _as_published(whole.per_answer)},
            plots={} if plot is None else {"retrieval_heads.png": plot},
        )

    def policy(self, layout: ModelLayout, learned: Scores | None) -> AttentionPolicy:
        layers, shape = len(layout.blocks), attention_shape(layout)
        if learned is None:
            scores = torch.zeros(layers, shape.heads)
            learned = Scores(scores=scores, accepted=0, answers=0)
        scores = of_shape("copy scores", learned.scores, layers, shape.heads)
        by_kv = of_kv_heads(scores, shape.kv_heads)
        full = keep_full(by_kv, self.share) if self.share else torch.ones_like(by_kv).bool()
        return streaming_policy(
            layout,
            ~full,
            sinks=self.sinks,
            window=self.window,
            made_by={"retrieval_heads": self._about(learned)},
        )

    def _about(self, found: Scores) -> dict[str, Any]:
        parameters = self.model_dump(mode="json", include={"rows", "share", "sinks", "window"})
        return {**parameters, **found.figures()}


def _ranking(scores: Tensor) -> dict[str, Any]:
    """The strongest heads, and how many reach the published marks for (strong) retrieval heads."""
    best = scores.flatten().argsort(descending=True)[:10].tolist()
    heads = scores.shape[1]
    return {
        "top": [f"{i // heads}-{i % heads}: {float(scores.flatten()[i]):.2f}" for i in best],
        "at_least_0.1": int((scores >= 0.1).sum()),
        "at_least_0.5": int((scores >= 0.5).sum()),
    }


def _as_published(per_answer: Tensor) -> bytes:
    """The reference's file: one line of JSON, "layer-head" → the scores of all accepted answers."""
    data = {
        f"{layer}-{head}": [round(float(x), 6) for x in per_answer[layer, :, head]]
        for layer in range(per_answer.shape[0])
        for head in range(per_answer.shape[2])
    }
    return (json.dumps(data) + "\n").encode()
