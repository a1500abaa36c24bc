"""SignRound (arXiv 2309.05516), the rule of AutoRound: codes and ranges learned block by block.

Each weight is moved by an offset of its own before it is rounded, and both ends of each group's
range are shrunk. Offsets and shares go by one fixed length along the sign of their gradient, by
less with every step, so that what leaves a block comes closer to what leaves the original one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.unit import Unit
from compressor.methods.base import BlockNeeds, Effects, Needs, Pass
from compressor.methods.common import integers
from compressor.methods.common.block_fit import Kept, draws, loss_of, steps
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.rounding import round_to_nearest, weight_row
from compressor.methods.common.shapes import undivided
from compressor.numerics.learned_grid import (
    as_qtensor,
    grouped,
    learned_grid,
    learned_steps,
    range_of,
)

COPIES = 8
"""Offsets, their gradients and the best ones; codes before and after they are rounded and clamped,
and what they stand for."""


class Signround(Pass):
    """Learn how weights are rounded and ranges clipped, by signs of gradients (AutoRound)."""

    version: ClassVar[int] = 1

    bits: int = Field(4, ge=2, le=8, description="bits of one weight")
    group_size: int | None = Field(
        128, ge=1, description="neighbouring inputs that share a scale; null for a whole row"
    )
    symmetric: bool = Field(True, description="grids centred on zero; false stores zero points")
    steps: int = Field(200, ge=1, le=100_000, description="steps of each block")
    batch: int = Field(8, ge=1, description="calibration rows in each step")
    rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="how far the first step moves an offset, in steps of the grid; it falls to "
        "zero by the last. null: 1/steps",
    )
    ranges: bool = Field(True, description="learn how far each group's range is clipped, too")

    def effects(self) -> Effects:
        spec = integers.int_spec(self.bits, self.group_size, symmetric=self.symmetric)
        return Effects(scheme=Scheme(weight=spec))

    def needs(self) -> Needs:
        return Needs(block=BlockNeeds(steps=self.steps, rows=self.batch, copies=COPIES))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        yield from undivided(context.selected, self.group_size)
        if context.rows < self.batch:
            yield InputError(
                f"each step reads {self.batch} rows, but calibration has {context.rows}",
                hint="raise calibration.samples (128 or more), or lower batch",
            )

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        linears = context.coded
        if context.tune is None:
            found = round_to_nearest(unit, context)
            note = {"note": "outside blocks nothing is learned: rounded to nearest"}
            return PassResult(found.unit, [{**row, **note} for row in found.rows])
        block = context.tune(unit)
        roundings = {
            x.name: SignRounding(unit.weight(x), context.spec(x), ranges=self.ranges)
            for x in linears
        }
        row: dict[str, Any] = {"block": unit.layout.name}
        every = range(block.rows)
        row["loss_of_nearest"] = start = loss_of(block, roundings, every)
        nearest, best = Kept(roundings), Kept(roundings)
        generator = torch.Generator().manual_seed(context.seed)
        least, rate = math.inf, self.rate or 1 / self.steps
        for step in steps(
            block,
            roundings,
            lambda number: _descend(roundings, rate * (1 - number / self.steps)),
            count=self.steps,
            batches=draws(every, min(self.batch, block.rows), generator),
            progress=context.progress,
        ):
            if step.loss < least:
                least = step.loss
                row["best_step"] = step.number
                best.keep()
        best.restore()
        row["loss"] = loss_of(block, roundings, every)
        if not row["loss"] < start:
            nearest.restore()
            row["note"] = "the loss did not fall below that of rounding to nearest, which is kept"
        rows = [row]
        for linear in linears:
            q = roundings[linear.name].quantized()
            rows.append(dict(weight_row(linear, unit.weight(linear), q, stats=None)))
            unit = unit.with_quantized(linear, q)
        return PassResult(unit, rows)


class SignRounding:
    """One weight [out, in] with its offsets and the shares of its ranges, all float32."""

    def __init__(self, weight: Tensor, spec: QuantSpec, *, ranges: bool) -> None:
        self.spec = spec
        self.groups = grouped(weight.float(), spec)
        self.span = range_of(self.groups)
        self.offsets = torch.zeros_like(self.groups).requires_grad_()
        self.low_share = torch.ones_like(self.span.low).requires_grad_(ranges)
        self.high_share = torch.ones_like(self.span.high).requires_grad_(ranges)

    def parameters(self) -> list[Tensor]:
        shares = [self.low_share, self.high_share]
        return [self.offsets, *(x for x in shares if x.requires_grad)]

    def weight(self) -> Tensor:
        taken, scales, _ = self._rounded()
        return (taken * scales[..., None]).flatten(1)

    @torch.no_grad()
    def quantized(self) -> QTensor:
        return as_qtensor(*self._rounded(), self.spec)

    def descend(self, length: float) -> None:
        """Move everything against the sign of its gradient. The sign of NaN is 0."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.nan_to_num_(nan=0.0).sign_(), alpha=length)
        self.low_share.clamp_(0, 1)
        self.high_share.clamp_(0, 1)

    def _rounded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        scales, zeros = learned_grid(self.span, self.low_share, self.high_share, self.spec)
        return learned_steps(self.groups, self.offsets, scales, zeros, self.spec), scales, zeros


def _descend(roundings: dict[str, SignRounding], length: float) -> None:
    for rounding in roundings.values():
        rounding.descend(length)


PASS = Signround
