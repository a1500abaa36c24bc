"""Quest (arXiv 2406.10774): a decoding step reads the pages of keys that could matter most.

Of each page of 16 keys the smallest and largest value of every channel is kept; they bound what a
query's product with any key of the page can be. The pages with the best bounds are attended to, for
each query head by itself, and the last page always. The whole cache stays in memory; what is saved
is reading it. Nothing is learned and no weight changes.
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from compressor.attention.policy import AttentionPolicy, rule_policy
from compressor.attention.rules.quest import QuestPages
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.methods.base import Cost, ModelPass
from compressor.methods.common.chosen_blocks import reads
from compressor.methods.common.context import PlanContext
from compressor.methods.common.dense_layers import Layers, missing_layers
from compressor.methods.common.learned import Learned


class Quest(ModelPass[Learned]):
    """Let layers attend to the pages of keys whose bounds promise most; changes no weight."""

    page_size: int = Field(16, ge=1, description="keys of a page")
    token_budget: int = Field(1024, ge=1, description="keys of a query, in whole pages")
    dense_layers: Layers = Field(
        (0, 1), description="layers that attend to everything, as published"
    )
    per: Literal["query_head", "kv_head"] = Field(
        "query_head",
        description="a choice for each query head, as published, or the best bound of the heads "
        "that share a KV head",
    )
    dense_below: int = Field(0, ge=0, description="shorter texts are attended to whole")

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        if self.token_budget < self.page_size:
            raise ValueError(f"a budget of {self.token_budget} does not hold one page")
        return self

    @property
    def block_choice(self) -> QuestPages:
        """What layers do."""
        return QuestPages(
            block_size=self.page_size,
            init_blocks=0,
            local_blocks=0,
            top_k=self.token_budget // self.page_size,
            per=self.per,
            dense_below=self.dense_below,
        )

    def check(self, context: PlanContext) -> Iterator[InputError]:
        if self.altered("dense_layers"):
            yield from missing_layers(self.dense_layers, context.layout)

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        dense, layers = len(self.dense_layers), len(context.layout.blocks)
        whole = f"; {dense} of {layers} layers read all" if dense else ""
        return Cost(notes=(reads(self.block_choice) + whole,))

    def policy(self, layout: ModelLayout, learned: Learned | None) -> AttentionPolicy:
        made_by = {"quest": self.parameters}
        return rule_policy(layout, self.block_choice, made_by=made_by, dense=self.dense_layers)
