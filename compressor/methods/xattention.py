"""XAttention (arXiv 2503.16428): long prompts in tiles, those that hold a share of an estimate.

The estimate of what blocks attend to comes from antidiagonals of the scores. How much of it a head
needs is calibrated from text, as the released profile_threshold.py does: of true attention the
fewest blocks that hold `coverage` of it are taken, and the threshold is the share of the estimate
in all blocks that are estimated as high as the least of them; over texts the largest counts. The
search by dynamic programming of the paper is nowhere written down. One block is in memory at a
time, and no weight changes. Steps of decoding attend to everything.
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from compressor_kernels.attention.antidiagonal import antidiagonal_sums_ref
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.policy import AttentionPolicy, LayerPolicy, attention_shape, policy_of
from compressor.attention.quality import watch_attention
from compressor.attention.rules.xattention import XAttention as Tiles
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout, UnitLayout
from compressor.methods.base import Cost, ModelPass, Needs
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.dense_layers import Layers, missing_layers
from compressor.methods.common.head_plots import heat_map
from compressor.methods.common.learned import Learned
from compressor.numerics.attention_thresholds import block_mass, mass_threshold
from compressor.runner.attention_call import AttentionCall
from compressor.runner.source_model import SourceModel


class Thresholds(Learned):
    """A threshold for each query head, fp32 [layers, heads], and the tokens of the rows that they
    were calibrated on."""

    threshold: Tensor
    calibrated: int | None = None


class XAttention(ModelPass[Thresholds]):
    """Let prompts attend to the tiles that an estimate finds worth it; changes no weight."""

    coverage: float = Field(
        0.9, gt=0, lt=1, description="share of true attention that thresholds are to keep"
    )
    threshold: float | None = Field(
        None, gt=0, le=1, description="one threshold for all heads, in place of calibrated ones"
    )
    stride: Literal[4, 8, 16] = Field(8, description="queries and keys that are estimated together")
    block_size: Literal[16, 32, 64, 128] = Field(128, description="queries and keys of a tile")
    dense_layers: Layers = Field((), description="layers that attend to everything")
    as_released: bool = Field(
        False, description="choose tiles of the first chunk as the released code does"
    )

    def needs(self) -> Needs:
        return Needs(tokens=self.threshold is None)

    @property
    def records_quality(self) -> bool:
        return True

    def check(self, context: PlanContext) -> Iterator[InputError]:
        yield from missing_layers(self.dense_layers, context.layout)
        if self.threshold is None and context.length < 4 * self.block_size:
            yield InputError(
                f"rows of {context.length} tokens are {context.length // self.block_size} blocks "
                f"of {self.block_size}: too few to calibrate thresholds on",
                hint=f"calibration: {{length: {8 * self.block_size}}}, or a smaller block_size",
            )

    def longest_text(self, length: int) -> int | None:
        return length if self.threshold is None else None

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        note = f"prompts in tiles of {self.block_size} by an estimate of stride {self.stride}"
        if self.threshold is not None:
            return Cost(notes=(note,))
        return Cost(scores=4.0 * context.rows * context.length**2, notes=(note,))

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Thresholds]:
        shape = attention_shape(model.layout)
        found = torch.zeros(len(model.layout.blocks), shape.heads)
        if self.threshold is not None:
            return LearnResult(Thresholds(threshold=found + self.threshold))

        def watch(unit: UnitLayout, call: AttentionCall) -> None:
            q, k, size, scale = call.query, call.key, self.block_size, call.scaling
            mass = block_mass(q, k, block_size=size, scale=scale)
            sums = antidiagonal_sums_ref(q, k, block_size=size, stride=self.stride, scale=scale)
            texts = mass_threshold(mass, sums, coverage=self.coverage).amax(0).cpu()
            found[unit.index] = torch.maximum(found[unit.index], texts)

        watch_attention(model, context.ids, watch, batch=context.batch, progress=context.progress)
        plot = heat_map(found, title="XAttention's thresholds", across="query head")
        rows = [
            {
                "layer": layer,
                "threshold": float(line.mean()),
                "lowest": float(line.min()),
                "highest": float(line.max()),
            }
            for layer, line in enumerate(found)
        ]
        return LearnResult(
            Thresholds(threshold=found, calibrated=context.ids.shape[1]),
            rows=rows,
            plots={} if plot is None else {"xattention.png": plot},
        )

    def policy(self, layout: ModelLayout, learned: Thresholds | None) -> AttentionPolicy:
        shape = attention_shape(layout)
        # Before calibration: a threshold that stands for any.
        values, calibrated = torch.ones(len(layout.blocks), shape.heads), None
        if learned is not None:
            values, calibrated = learned.threshold, learned.calibrated
        rules = (self._rule(line, calibrated) for line in values)
        layers = [
            LayerPolicy(rules=() if number in self.dense_layers else (rule,))
            for number, rule in enumerate(rules)
        ]
        about = self.parameters
        about |= {} if calibrated is None else {"calibrated": calibrated}
        return policy_of(layout, layers, made_by={"xattention": about})

    def _rule(self, threshold: Tensor, calibrated: int | None) -> Tiles:
        return Tiles(
            threshold=tuple(min(1.0, float(x)) for x in threshold),
            block_size=self.block_size,
            stride=self.stride,
            as_released=self.as_released,
            calibrated=calibrated,
        )

    @model_validator(mode="after")
    def _strides_divide(self) -> Self:
        if self.block_size % self.stride:
            raise ValueError(f"stride {self.stride} does not divide blocks of {self.block_size}")
        return self
