"""MoBA (arXiv 2502.13189) and FlashMoBA (arXiv 2511.11571): for models that were trained with it.

Each query head of a prompt attends to the blocks whose mean keys it likes best. A model that was
not trained so loses what its attention spreads over more blocks, and no calibration makes up for
that: `compress measure MODEL --attention moba` says how much it would be. Block size and count come
from the model's config (`moba_chunk_size`, `moba_topk`), a convolution of keys from its `k_conv`
tensors. Decoding attends to everything, as in the released code.
"""

from collections.abc import Iterator

import torch
from pydantic import Field

from compressor.attention.policy import AttentionPolicy, rule_policy
from compressor.attention.rules.moba import KEY_CONVOLUTION, MoBABlocks
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import Cost, ModelPass
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.dense_layers import Layers, missing_layers
from compressor.methods.common.learned import Learned
from compressor.runner.source_model import SourceModel

CHUNK, TOP_K = "moba_chunk_size", "moba_topk"


class Trained(Learned):
    """What a model was trained with."""

    block_size: int
    top_k: int
    convolution: bool


class MoBA(ModelPass[Trained]):
    """Have prompts attend as a model was trained to; changes no weight."""

    dense_layers: Layers = Field((), description="layers that were trained with full attention")

    def check(self, context: PlanContext) -> Iterator[InputError]:
        yield from missing_layers(self.dense_layers, context.layout)
        for name in (CHUNK, TOP_K):
            value = context.config.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield InputError(
                    f"the model was not trained with MoBA: its config has no {name}",
                    hint="compress measure MODEL --attention moba says what it would lose",
                )
                return

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        size, count = (context.config.get(name) for name in (CHUNK, TOP_K))
        return Cost(notes=(f"prompts attend to {count} blocks of {size} keys",))

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Trained]:
        names = model.source.checkpoint.entries
        found = Trained(
            block_size=model.config[CHUNK],
            top_k=model.config[TOP_K],
            convolution=any(name.endswith(f".{KEY_CONVOLUTION}") for name in names),
        )
        return LearnResult(found)

    def policy(self, layout: ModelLayout, learned: Trained | None) -> AttentionPolicy | None:
        if learned is None:
            return None
        found = learned.figures()
        made_by, rule = {"moba": found}, MoBABlocks(**found)
        return rule_policy(layout, rule, made_by=made_by, dense=self.dense_layers)
