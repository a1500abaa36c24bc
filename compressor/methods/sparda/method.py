"""SparDA (arXiv 2606.04511): each block forecasts which keys the next one will look at.

A projection beside q, k and v turns what a block's attention reads into one vector for each KV head
of the next block; its products with that block's compressed keys choose the blocks of keys to be
attended to. The choice is known one block early, so a runtime can fetch the blocks from host memory
meanwhile, and it needs one head for each group and no softmax. Only these projections are trained,
on the block's own attention; the model stays as it is.
"""

import json
import math
from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from compressor_kernels.attention.block_windows import WindowRule
from pydantic import Field, model_validator

from compressor.attention.policy import AttentionPolicy
from compressor.attention.quality_record import held_out
from compressor.attention.rules.forecast import CURRENT, FUTURE, ForecastBlocks
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout, UnitLayout
from compressor.ir.tensor import TensorShape
from compressor.methods.base import Cost, Effects, Needs
from compressor.methods.common.chosen_blocks import ChosenBlocks, reads
from compressor.methods.common.context import LearnContext, LearnResult, PlanContext
from compressor.methods.common.learned import Learned
from compressor.methods.sparda.choice_record import RECORD_NAME, record_choices
from compressor.methods.sparda.teacher import Teacher
from compressor.methods.sparda.training import Trainer, Training
from compressor.runner.source_model import SourceModel


class Recall(Learned):
    """How many of the teacher's blocks each scorer finds; the forecasts that were trained are
    tensors of the checkpoint.

    recall  scorer → mean over layers
    """

    recall: dict[str, float]


class SparDA(ChosenBlocks[Recall]):
    """Train a projection per layer that forecasts the blocks of keys the next layer needs.

    The calibration rows are the training rows: give long ones, and enough of them that none is seen
    often (the published training sees 64,000 rows of 65,536 tokens once).
    """

    version: ClassVar[int] = 2
    rule: ClassVar[type[InfLLMBlocks]] = ForecastBlocks

    teacher_kernel: int = Field(2, ge=1, description="keys of a compressed key of the teacher")
    teacher_stride: int = Field(1, ge=1, description="keys from one of those to the next")
    pooling: Literal["max", "mean"] = Field(
        "max", description="how the teacher's shares come onto the grid of the compressed keys"
    )
    progressive: bool = Field(
        False, description="begin with the model's own compressed keys as teacher, then halve them"
    )
    steps: int = Field(2000, ge=1, description="steps of the optimizer for each layer")
    rows_per_step: int = Field(32, ge=1, description="rows of one step")
    learning_rate: float = Field(5e-4, gt=0)
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(0.5, gt=0, description="largest norm of a layer's gradient")
    initial: Literal["uniform", "queries"] = Field(
        "uniform",
        description="what forecasts start from: small random values, as published, or a fit of the "
        "mean queries of the block they are for, with which few steps do",
    )
    states: Literal["chosen", "full"] = Field(
        "chosen",
        description="let hidden states flow through attention over the teacher's blocks, as "
        "published, or through the model's own",
    )
    held_out_rows: int = Field(2, ge=1, description="held-out rows that recall is measured on")

    @model_validator(mode="after")
    def _grids_fit(self) -> Self:
        if self.stride % self.teacher_stride or self.teacher_kernel % self.teacher_stride:
            raise ValueError(
                f"teacher_stride {self.teacher_stride} divides stride {self.stride} and "
                f"teacher_kernel {self.teacher_kernel}, or the grids do not meet"
            )
        return self

    @property
    def training(self) -> Training:
        """How forecasts are trained."""
        fine = WindowRule(kernel_size=self.teacher_kernel, stride=self.teacher_stride)
        return Training(
            teacher=Teacher(selection=self.block_choice, fine=fine, pooling=self.pooling),
            chosen_states=self.states == "chosen",
            **self.model_dump(include={*Training.__dataclass_fields__} & {*SparDA.model_fields}),
        )

    def effects(self) -> Effects:
        entries = {
            **self.block_choice.config()["sparse_config"],
            "create_indexer": True,
            "use_q_future_for_topk": True,
            "use_q_future_decode_only": False,
            "training_kernel_size": self.teacher_kernel,
            "training_kernel_stride": self.teacher_stride,
            "kl_target_align_pooling": self.pooling,
            "progressive_training_kernel": self.progressive,
            "indexer_kaiming_init": self.initial == "uniform",
        }
        return Effects(works_on="none", config={"sparse_config": entries})

    def needs(self) -> Needs:
        return Needs(tokens=True)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        blocks = -(-context.length // self.block_size)
        if blocks <= self.top_k:
            yield InputError(
                f"rows of {context.length} tokens have {blocks} blocks, of which {self.top_k} "
                "are chosen: there is nothing to learn",
                hint=f"calibration.length: {2 * self.top_k * self.block_size}, or fewer or "
                "smaller blocks",
            )

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        layout, rows, length = context.layout, context.rows, context.length
        tensors = self.adds(layout, context.dtype).values()
        added = sum(math.prod(tensor.shape) for unit in tensors for tensor in unit.values())
        width = max(linear.in_features for linear in layout.head.linears)
        kept = 2 * rows * length * width * context.dtype.itemsize  # two buffers of hidden states
        seen = self.steps * self.rows_per_step / rows
        # A teacher for each row of each step; for each row as it goes on, one more and the
        # attention that its choice is for.
        heads = sum(u.attention.heads for u in layout.units if u.kind == "block" and u.attention)
        onward = 2 * rows if self.states == "chosen" and length >= self.dense_below else rows
        taught = self.steps * self.rows_per_step / self.teacher_stride
        return Cost(
            scratch=kept,
            scores=(taught + onward) * heads * float(length) ** 2,
            notes=(
                f"{added:,} parameters are added, {added / context.parameters:.2%} of the model's",
                f"{kept / 1e9:.2f} GB of activations are kept on disk while it trains; each of the "
                f"{rows} rows is seen {seen:.1f} times",
                reads(self.block_choice),
            ),
        )

    def adds(self, layout: ModelLayout, dtype: torch.dtype) -> dict[str, dict[str, TensorShape]]:
        found = {}
        for unit in layout.units:
            if unit.kind == "block" and unit.attention is not None:
                rows = unit.attention.kv_heads * unit.attention.head_dim
                tensor = TensorShape(dtype, (rows, _entering(unit)))
                names = [FUTURE] if unit.index else [FUTURE, CURRENT]
                found[unit.name] = {f"{unit.attention_path}.{name}": tensor for name in names}
        return found

    def divides(self, *, one_host: bool) -> bool:
        return one_host

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Recall]:
        trainer = Trainer(
            model,
            context.ids,
            self.training,
            seed=context.seed,
            batch=context.batch,
            scratch=context.scratch,
            progress=lambda name, done, total: context.progress(
                f"forecast for {name}", done, total
            ),
            stops=context.stops,
            ranks=context.ranks,
        )
        # Recall needs blocks to choose from, not the longest rows, of which the text has few.
        length = min(context.ids.shape[1], 2 * self.top_k * self.block_size)
        text = held_out(model.tokenizer(), rows=self.held_out_rows, length=length)
        trained = trainer.run()
        blocks = model.layout.blocks
        dtype = next(iter(model.read_unit(0).tensors.values())).dtype  # as it is stored
        named = trained.named([unit.attention_path for unit in blocks])
        forecasts = {name: tensor.to(dtype) for name, tensor in named.items()}
        record = context.ranks.led(
            lambda: record_choices(model, self.training.teacher, forecasts, text)
        )
        means = record.to_json()["means"]
        recall = {name: round(found["recall"], 4) for name, found in means.items()}
        rows = [
            {"name": unit.name, "loss_first": first, "loss_last": last}
            | {q.scorer: q.recall for q in record.layers if q.layer == unit.index}
            for unit, (first, last) in zip(blocks, trained.losses, strict=True)
        ]
        return LearnResult(
            Recall(recall=recall),
            extra=forecasts,
            rows=rows,
            files={RECORD_NAME: (json.dumps(record.to_json(), indent=1) + "\n").encode()},
        )

    def policy(self, layout: ModelLayout, learned: Recall | None) -> AttentionPolicy:
        found = {} if learned is None else learned.figures()
        return self.everywhere(layout, {"sparda": {**self.parameters, **found}})


def _entering(unit: UnitLayout) -> int:
    return next(x.in_features for x in unit.linears if x.role in ("attn.q", "attn.qkv"))
