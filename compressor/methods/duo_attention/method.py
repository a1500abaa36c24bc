"""DuoAttention (arXiv 2410.10819): which KV heads need the whole context, learned as gates.

Deviations from the reference: rows have exactly their nominal length, also the last step is
clamped, gates are float32 while the model runs in its own dtype, and a head streams by the token
mask in every phase, where the reference's deployment lets the first chunk see everything.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.attention.policy import AttentionPolicy, check_policy
from compressor.attention.rules.streaming import streaming_policy
from compressor.errors import InputError
from compressor.ir.layout import Linear, ModelLayout, Rows
from compressor.ir.unit import Unit
from compressor.methods.base import (
    FrozenModel,
    LearnContext,
    Learned,
    ModelPass,
    PassContext,
    PassResult,
)
from compressor.methods.common.copy_scores import copy_scores
from compressor.methods.common.head_plots import curves, heat_map
from compressor.methods.common.needles import Needles, haystack_of, make_row
from compressor.methods.duo_attention.gate_training import Penalty, start_gates, train_gates
from compressor.numerics.head_gates import (
    full_first,
    gap_at,
    hoyer_square,
    hoyer_threshold,
    keep_full,
    reorder_rows,
    threshold_full,
)

ORDER = "duo_attention.order"
GATES = "duo_attention.gates"


class DuoAttention(ModelPass):
    """Learn which KV heads need the whole context; the others see sinks and a recent window.

    The haystack is the calibration text; nothing of the model is trained but one gate for each
    layer and KV head. Writes an attention policy.
    """

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

    @property
    def holds_model(self) -> bool:
        return True

    def learning_bytes(
        self, layout: ModelLayout, *, length: int, vocabulary: int, itemsize: int
    ) -> int:
        blocks = [unit for unit in layout.units if unit.kind == "block"]
        hidden = max(x.in_features for x in layout.head.linears)
        widest = max(x.out_features for unit in blocks for x in unit.linears)
        tokens = self.batch * self.data.max_length
        # Each layer keeps the gated stream's input and the full one's attention; one layer runs
        # with a gradient, under a mask of booleans that the attention makes a float one of.
        kept = itemsize * tokens * (2 * hidden * len(blocks) + 10 * hidden + 8 * widest)
        return kept + (1 + 2 * itemsize) * self.data.max_length**2

    @property
    def works_on_blocks(self) -> bool:  # type: ignore[override]
        """Only to reorder heads."""
        return self.reorder

    def config_entries(self, layout: ModelLayout) -> Mapping[str, Any]:
        """Nothing; refuses, in `plan`, a model whose heads no policy can describe."""
        shape = next((unit.attention for unit in layout.units if unit.attention), None)
        if shape is not None:
            blocks = sum(unit.kind == "block" for unit in layout.units)
            rows = torch.ones(blocks, shape.kv_heads, dtype=torch.bool)
            sinks, window = self.deployed
            check_policy(streaming_policy(layout, rows, sinks=sinks, window=window), layout)
        return {}

    def learn(self, model: FrozenModel, context: LearnContext) -> Learned:
        """Train the gates, and choose heads by them."""
        assert context.tokens is not None
        haystack = haystack_of(context.tokens.ids)
        self._check_rows(model, haystack)
        shape = next(unit.attention for unit in model.layout.units if unit.attention)
        layers = sum(unit.kind == "block" for unit in model.layout.units)
        scores = self._scores(model, context, haystack) if self.init == "retrieval" else None
        trained = train_gates(
            model,
            context,
            # At equal gates Hoyer's gradient is zero: a little spread breaks the tie.
            start=start_gates(
                (layers, shape.kv_heads),
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
            name="duo_attention",
        )
        return self._learned(model, trained.gates, trained.losses)

    def _check_rows(self, model: FrozenModel, haystack: list[int]) -> None:
        positions = model.layout.sizes.positions
        if positions is not None and self.data.max_length > positions:
            raise InputError(
                f"duo_attention: rows of {self.data.max_length} tokens are longer than the model's "
                f"{positions} positions",
                hint="lower data.max_length",
            )
        for length in (self.data.row_lengths[0], self.data.row_lengths[-1]):
            make_row(
                model.tokenizer(), haystack, data=self.data, length=length, draw=random.Random(0)
            )

    def _scores(self, model: FrozenModel, context: LearnContext, haystack: list[int]) -> Tensor:
        draw = random.Random(f"{context.seed} scores")
        length = self.data.row_lengths[0]
        encode = model.tokenizer()
        rows = [
            make_row(encode, haystack, data=self.data, length=length, draw=draw) for _ in range(8)
        ]
        found = copy_scores(model, rows, batch=context.batch)
        shape = next(unit.attention for unit in model.layout.units if unit.attention)
        return found.kv_heads(shape.kv_heads)

    def _choose(self, gates: Tensor) -> tuple[Tensor, float]:
        """Which heads stay full, and the gate that parts them from the others."""
        if self.share is not None:
            full = keep_full(gates, self.share)
            chosen = gates[full]
            return full, float(chosen.min()) if len(chosen) else 1.0
        threshold = self.threshold
        if threshold is None:
            threshold = hoyer_threshold(gates) if self.regularizer == "hoyer2" else 0.5
        return threshold_full(gates, threshold), threshold

    def policy_again(
        self, layout: ModelLayout, stored: AttentionPolicy, values: Mapping[str, Tensor]
    ) -> AttentionPolicy:
        if GATES not in values:
            raise InputError(f"the policy's {GATES} are not stored with it")
        full, _ = self._choose(values[GATES])
        sinks, window = self.deployed
        return streaming_policy(layout, ~full, sinks=sinks, window=window, reordered=self.reorder)

    def _learned(self, model: FrozenModel, gates: Tensor, losses: Tensor) -> Learned:
        full, threshold = self._choose(gates)
        order = torch.stack([full_first(row) for row in full])
        plot = heat_map(gates, title="DuoAttention gates (1: needs the whole context)")
        if self.reorder:
            gates, full = gates.gather(1, order), full.gather(1, order)
        sinks, window = self.deployed
        found = {
            "streaming_share": float((~full).float().mean()),
            "threshold": threshold,
            "gap": gap_at(gates, threshold),
            "active_gates": float(hoyer_square(gates)),
        }
        parameters = self.model_dump(mode="json", exclude={"data", "targets", "ignore"})
        policy = streaming_policy(
            model.layout,
            ~full,
            sinks=sinks,
            window=window,
            reordered=self.reorder,
            made_by={"duo_attention": {**parameters, **found}},
        )
        rows: list[dict[str, Any]] = [
            {
                "name": f"layer {number}",
                "full_heads": [int(i) for i in row_full.nonzero()[:, 0]],
                "gates": [round(float(gate), 4) for gate in row],
            }
            for number, (row, row_full) in enumerate(zip(gates, full, strict=True))
        ]
        last = losses[-max(1, len(losses) // 10) :].mean(0)
        rows.append({"name": "gates", **found, "distillation": float(last[0])})
        steps = range(1, len(losses) + 1)
        drawn = {
            "duo_attention_gates.png": plot,
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
        values = {GATES: gates}
        return Learned(
            policy=policy.to_json(),
            values={**values, ORDER: order} if self.reorder else values,
            rows=rows,
            plots={name: data for name, data in drawn.items() if data is not None},
        )

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        """The block with its KV heads sorted, full ones first; the same function."""
        shape = unit.layout.attention
        if not self.reorder or shape is None:
            return PassResult(unit)
        order = context.learned[ORDER][unit.layout.index]
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


PASS = DuoAttention
