"""InfLLM-V2's selector (the sparse attention of MiniCPM4; InfLLM is arXiv 2402.04617).

Each query attends to 64-token blocks of keys, one choice for all heads that share a KV head: the
first blocks, the blocks before its own, and the blocks whose mean keys its heads attend to most.
Nothing is learned and no weight changes. Models trained with this attention keep their quality; a
dense model loses what its attention spreads over more blocks.
"""

import torch

from compressor.attention.policy import AttentionPolicy
from compressor.ir.layout import ModelLayout
from compressor.methods.base import Cost, Effects
from compressor.methods.common.chosen_blocks import ChosenBlocks, reads
from compressor.methods.common.context import PlanContext
from compressor.methods.common.learned import Learned


class InfLLM(ChosenBlocks[Learned]):
    """Let every layer attend to blocks that attention to mean keys chooses; changes no weight."""

    def effects(self) -> Effects:
        return Effects(works_on="none", config=self.block_choice.config())

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        return Cost(notes=(reads(self.block_choice),))

    def policy(self, layout: ModelLayout, learned: Learned | None) -> AttentionPolicy:
        return self.everywhere(layout, {"infllm": self.parameters})
