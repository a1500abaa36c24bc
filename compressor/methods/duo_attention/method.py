"""DuoAttention (arXiv 2410.10819): which KV heads need the whole context, learned as gates.

Deviations from the reference: rows have exactly their nominal length, also the last step is
clamped, gates are float32 while the model runs in its own dtype, and a head streams by the token
mask in every phase, where the reference's deployment lets the first chunk see everything.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.policy import AttentionPolicy, attention_shape
from compressor.attention.rules.streaming import streaming_policy
from compressor.errors import InputError, several
from compressor.ir.layout import Linear, ModelLayout, Rows, UnitLayout
from compressor.ir.unit import Unit
from compressor.methods.base import Cost, Effects, ModelPass, Needs
from compressor.methods.common.context import (
    LearnContext,
    LearnResult,
    PassContext,
    PassResult,
    PlanContext,
)
from compressor.methods.common.copy_scores import copy_scores, of_kv_heads
from compressor.methods.common.head_plots import curves, heat_map
from compressor.methods.common.learned import Learned, of_shape
from compressor.methods.common.needles import Needles, make_row, too_long
from compressor.methods.duo_attention.gate_training import Penalty, start_gates, train_gates
from compressor.numerics.head_gates import (
    full_first,
    gap_at,
    hoyer_square,
    hoyer_threshold,
    keep_full,
    reorder_rows,
)
from compressor.runner.source_model import SourceModel


class Gates(Learned):
    """A gate for each KV head, [layers, kv_heads], 1 where it needs the whole context; of heads in
    the order in which they are written.

    order  [layers, kv_heads], which head of the source comes at each place, where they are sorted
    """

    gates: Tensor
    order: Tensor | None = None


class DuoAttention(ModelPass[Gates]):
    """Learn which KV heads need the whole context; the others see sinks and a recent window.

    The haystack is the calibration text; nothing of the model is trained but one gate for each
    layer and KV head. Writes an attention policy.
    """

    version: ClassVar[int] = 2

    data: Needles = Field(Needles(), description="the synthetic passkey rows")
    sinks: int = Field(128, ge=0, description="first tokens a streaming head sees, in training")
    window: int = Field(256, ge=1, description="recent tokens it sees, its own included")
    deploy_sinks: int | None = Field(None, ge=0, description="sinks in the policy; as in training")
    deploy_window: int | None = Field(None, ge=1, description="window in the policy; likewise")
    num_steps: int = Field(2000, ge=1, description="optimiser steps")
    lr: float = Field(0.02, gt=0, description="AdamW's peak learning rate")
    batch: int = Field(1, ge=1, description="rows in a step")
    regularizer: Literal["l1", "hoyer2"] = Field("l1", description="what pushes gates to zero")
    reg_weight: float = Field(0.05, ge=0, description="its weight")
    budget: float | None = Field(
        None, gt=0, lt=1, description="hoyer2: share of active gates above which it pushes harder"
    )
    init: Literal["ones", "retrieval"] = Field(
        "ones", description="first gates: all open, or copy scores relative to the highest"
    )
    share: float | None = Field(
        0.5, ge=0, le=1, description="share of all KV heads that stream; null: by threshold"
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="gate from which a head is full; null: 0.5, or hoyer2's own"
    )
    reorder: bool = Field(False, description="sort KV heads in the weights, full ones first")

    @model_validator(mode="after")
    def _windows_hold_sinks(self) -> Self:
        for sinks, window in ((self.sinks, self.window), self.deployed):
            if sinks >= window:
                raise ValueError(f"{sinks} sinks are not fewer than the window of {window}")
        if self.share is not None and self.threshold is not None:
            raise ValueError("a threshold decides only where share is null")
        if self.budget is not None and self.regularizer != "hoyer2":
            raise ValueError("a budget goes with regularizer: hoyer2")
        return self

    @property
    def deployed(self) -> tuple[int, int]:
        """Sinks and window of the policy."""
        sinks = self.sinks if self.deploy_sinks is None else self.deploy_sinks
        return sinks, self.window if self.deploy_window is None else self.deploy_window

    def effects(self) -> Effects:
        return Effects(works_on="targets" if self.reorder else "none")

    def needs(self) -> Needs:
        return Needs(tokens=True, whole_model=True)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        yield from too_long(self.data, context.layout)
        stays = [name for unit in context.layout.blocks for name in _stays(unit)]
        if self.reorder and stays:
            yield InputError(
                f"heads cannot be sorted: {several(stays)} would stay in the model's order",
                hint="reorder: false, with which runtimes gather heads",
            )

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        blocks = context.layout.blocks
        hidden = max(x.in_features for x in context.layout.head.linears)
        widest = max(x.out_features for unit in blocks for x in unit.linears)
        tokens = self.batch * self.data.max_length
        # Each layer keeps the gated stream's input and the full one's attention; one layer runs
        # with a gradient, under a mask of booleans that the attention makes a float one of.
        kept = dtype.itemsize * tokens * (2 * hidden * len(blocks) + 10 * hidden + 8 * widest)
        return Cost(memory=kept + (1 + 2 * dtype.itemsize) * self.data.max_length**2)

    def divides(self, *, one_host: bool) -> bool:
        return True

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Gates]:
        """Train the gates, and choose heads by them."""
        haystack = context.ids.flatten().tolist()
        encode = model.tokenizer()
        for length in (self.data.row_lengths[0], self.data.row_lengths[-1]):
            make_row(encode, haystack, data=self.data, length=length, draw=random.Random(0))
        layers, kv_heads = len(model.layout.blocks), attention_shape(model.layout).kv_heads
        scores = None
        if self.init == "retrieval":
            scores = context.ranks.led(lambda: self._scores(model, context, haystack))
        gates, losses = train_gates(
            model,
            context,
            # At equal gates Hoyer's gradient is zero: a little spread breaks the tie.
            start=start_gates(
                (layers, kv_heads),
                spread=0.1 if self.regularizer == "hoyer2" else 0.0,
                seed=context.seed,
                scores=scores,
            ),
            data=self.data,
            haystack=haystack,
            penalty=Penalty(self.regularizer, self.reg_weight, self.budget),
            sinks=self.sinks,
            window=self.window,
            steps=self.num_steps,
            rate=self.lr,
            batch=self.batch,
        )
        # One rank keeps what is learned: it alone draws.
        plots = _plots(gates, losses) if context.ranks.leads else {}
        return self._result(gates, losses, plots)

    def _scores(self, model: SourceModel, context: LearnContext, haystack: list[int]) -> Tensor:
        draw = random.Random(f"{context.seed} scores")
        length = self.data.row_lengths[0]
        encode = model.tokenizer()
        rows = [
            make_row(encode, haystack, data=self.data, length=length, draw=draw) for _ in range(8)
        ]
        found = copy_scores(model, rows, batch=context.batch, stopping=context.stopping)
        return of_kv_heads(found.scores, attention_shape(model.layout).kv_heads)

    def _choose(self, gates: Tensor) -> tuple[Tensor, float]:
        """Which heads stay full, and the gate that parts them from the others."""
        if self.share is not None:
            full = keep_full(gates, self.share)
            chosen = gates[full]
            return full, float(chosen.min()) if len(chosen) else 1.0
        threshold = self.threshold
        if threshold is None:
            threshold = hoyer_threshold(gates) if self.regularizer == "hoyer2" else 0.5
        return (gates >= threshold).cpu(), threshold

    def policy(self, layout: ModelLayout, learned: Gates | None) -> AttentionPolicy:
        heads = len(layout.blocks), attention_shape(layout).kv_heads
        if learned is not None:
            of_shape("gates", learned.gates, *heads)
        sinks, window = self.deployed
        parameters = self.model_dump(mode="json", exclude={"data", "targets", "ignore"})
        about = {} if learned is None else self._about(learned)
        return streaming_policy(
            layout,
            torch.ones(heads).bool() if learned is None else ~self._full(learned),
            sinks=sinks,
            window=window,
            reordered=self.reorder,
            made_by={"duo_attention": {**parameters, **about}},
        )

    def _full(self, found: Gates) -> Tensor:
        """Which heads stay full, in the order in which they are written."""
        full, _ = self._choose(found.gates)
        if found.order is None:
            return full
        # Of equal gates, those come first that stay full.
        return torch.stack([row[full_first(row)] for row in full])

    def _about(self, found: Gates) -> dict[str, float]:
        _, threshold = self._choose(found.gates)
        return {
            "streaming_share": float((~self._full(found)).float().mean()),
            "threshold": threshold,
            "gap": gap_at(found.gates, threshold),
            "active_gates": float(hoyer_square(found.gates)),
            "bimodality": gap_at(found.gates, hoyer_threshold(found.gates)),
        }

    def _result(
        self, gates: Tensor, losses: Tensor, plots: Mapping[str, bytes]
    ) -> LearnResult[Gates]:
        found = Gates(gates=gates)
        if self.reorder:
            order = torch.stack([full_first(row) for row in self._full(found)])
            found = Gates(gates=gates.gather(1, order), order=order)
        rows: list[dict[str, Any]] = [
            {
                "name": f"layer {number}",
                "full_heads": [int(i) for i in row_full.nonzero()[:, 0]],
                "gates": [round(float(gate), 4) for gate in row],
                "active_gates": round(float(hoyer_square(row)), 4),
            }
            for number, (row, row_full) in enumerate(
                zip(found.gates, self._full(found), strict=True)
            )
        ]
        last = losses[-max(1, len(losses) // 10) :].mean(0)
        rows.append({"name": "gates", **self._about(found), "distillation": float(last[0])})
        return LearnResult(found, rows=rows, plots=plots)

    def apply(self, unit: Unit, context: PassContext, learned: Gates) -> PassResult:
        """The block with its KV heads sorted, full ones first; the same function."""
        shape = unit.layout.attention
        if learned.order is None or shape is None:
            return PassResult(unit)
        order = learned.order[unit.layout.index]
        changed: dict[str, Tensor] = {}
        for linear in unit.layout.linears:
            weight = unit.tensors.get(linear.weight_name)
            if weight is None:
                continue
            if linear.role in ("attn.q", "attn.k", "attn.v", "attn.qkv"):
                changed |= _rows(unit, linear, order)
            elif linear.role == "attn.o":
                size = linear.in_features // shape.kv_heads
                changed[linear.weight_name] = reorder_rows(weight.T, order, size=size).T
        return PassResult(unit.with_tensors({k: v.contiguous() for k, v in changed.items()}))


def _stays(unit: UnitLayout) -> Iterator[str]:
    """What a block's attention has by head, or shares with another block, beside what is sorted:
    gates, sinks, norms over all heads."""
    if unit.attention is None:
        return
    within = f"{unit.attention_path}."
    if unit.attention.shared:
        yield f"{within}k, which other blocks read"
    moved = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o")
    yield from (x.name for x in unit.linears if x.role not in moved and x.name.startswith(within))
    yield from (norm.name for norm in unit.norms if norm.role in ("norm.q.all", "norm.k.all"))
    yield from (name for name in unit.others if name.startswith(within))


def _rows(unit: Unit, linear: Linear, order: Tensor) -> dict[str, Tensor]:
    """A projection's weight and bias with the rows of its KV heads reordered."""
    found = {}
    for name in (linear.weight_name, linear.bias_name):
        tensor = unit.tensors.get(name)
        if tensor is not None:
            for rows in linear.rows or (Rows(linear.role, 0, linear.out_features),):
                piece = reorder_rows(rows.take(tensor), order, size=rows.total // len(order))
                tensor = rows.put(tensor, piece)
            found[name] = tensor
    return found


def _plots(gates: Tensor, losses: Tensor) -> dict[str, bytes]:
    """Pictures of the gates and of their training, where they can be drawn."""
    steps = range(1, len(losses) + 1)
    drawn = {
        "duo_attention_gates.png": heat_map(
            gates, title="DuoAttention gates (1: needs the whole context)"
        ),
        "duo_attention_losses.png": curves(
            {
                "distillation": list(zip(steps, losses[:, 0].tolist(), strict=True)),
                "penalty": list(zip(steps, losses[:, 1].tolist(), strict=True)),
            },
            title="DuoAttention training",
            x="step",
            y="loss",
            log=True,
        ),
    }
    return {name: data for name, data in drawn.items() if data is not None}
