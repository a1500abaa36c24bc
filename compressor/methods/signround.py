"""SignRound (arXiv 2309.05516), the rule of AutoRound: codes and ranges learned block by block.

Each weight is moved by an offset of its own before it is rounded, and both ends of each group's
range are shrunk. Offsets and shares go by one fixed length along the sign of their gradient, by
less with every step, so that what leaves a block comes closer to what leaves the original one.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from compressor_calibration.stats import StatNeeds
from pydantic import Field
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.unit import Unit
from compressor.methods.base import BlockNeeds, Needs
from compressor.methods.common.block_fit import Division, Kept, draws, loss_of, steps
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.on_grid import OnGrid
from compressor.methods.common.rounding import (
    options_of,
    round_to_nearest,
    weight_row,
    with_input_scales,
)
from compressor.numerics.learned_floats import floats_qtensor, learned_elements, learned_scales
from compressor.numerics.learned_grid import (
    as_qtensor,
    grouped,
    learned_grid,
    learned_steps,
    range_of,
)
from compressor.numerics.nvfp4 import global_divisor
from compressor.runner.pieces import UNREPEATABLE

COPIES = 8
"""Offsets, their gradients and the best ones; codes before and after they are rounded and clamped,
and what they stand for."""


class Signround(OnGrid):
    """Learn how weights are rounded and ranges clipped, by signs of gradients (AutoRound)."""

    version: ClassVar[int] = 3

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

    @property
    def fits_ranges(self) -> bool:
        return self.ranges

    def needs(self) -> Needs:
        block = BlockNeeds(steps=self.steps, rows=self.batch, copies=COPIES)
        return Needs(stats=StatNeeds(absmax=self.reads_absmax), block=block)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        yield from super().check(context)
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
        unit = with_input_scales(unit, linears, context)
        block = context.tune(unit)
        division = Division.of(linears, context.ranks)
        options = options_of(context, linears, [unit.weight(x) for x in linears])
        roundings = {
            x.name: sign_rounding(
                unit.weight(x), context.spec(x), ranges=self.ranges, amax=option.get("amax")
            )
            for x, option in zip(linears, options, strict=True)
            if division.mine(x)
        }
        row: dict[str, Any] = {"block": unit.layout.name}
        every = range(block.rows)
        row["loss_of_nearest"] = start = loss_of(block, roundings, every, division)
        nearest, best = Kept(roundings), Kept(roundings)
        generator = torch.Generator().manual_seed(context.seed)
        least, rate = math.inf, self.rate or 1 / self.steps
        for step in steps(
            block,
            roundings,
            lambda number: _descend(roundings, rate * (1 - number / self.steps)),
            count=self.steps,
            batches=draws(every, min(self.batch, block.rows), generator),
            division=division,
            progress=context.progress,
        ):
            if step.loss < least:
                least = step.loss
                row["best_step"] = step.number
                best.keep()
        best.restore()
        row["loss"] = loss_of(block, roundings, every, division)
        if not row["loss"] < start:
            nearest.restore()
            row["note"] = "the loss did not fall below that of rounding to nearest, which is kept"
        rows = [row]
        if not block.repeatable:
            rows.append({"block": unit.layout.name, "note": UNREPEATABLE})
        made = division.every({name: found.quantized() for name, found in roundings.items()})
        for linear in linears:
            q = made[linear.name]
            rows.append(dict(weight_row(linear, unit.weight(linear), q, stats=None)))
            unit = unit.with_quantized(linear, q)
        return PassResult(unit, rows)


class SignRounding:
    """One weight [out, in] on integers with its offsets and the shares of its ranges, all float32.

    What it has beside offsets are `shares`, each in [0, 1].
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, *, ranges: bool) -> None:
        self.spec = spec
        self.groups = grouped(weight.float(), spec)
        self.span = range_of(self.groups)
        self.offsets = torch.zeros_like(self.groups).requires_grad_()
        ends = (self.span.low, self.span.high)
        self.shares = [torch.ones_like(end).requires_grad_(ranges) for end in ends]

    def parameters(self) -> list[Tensor]:
        return [self.offsets, *(x for x in self.shares if x.requires_grad)]

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
        for share in self.shares:
            share.clamp_(0, 1)

    def _rounded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        low, high = self.shares
        scales, zeros = learned_grid(self.span, low, high, self.spec)
        return learned_steps(self.groups, self.offsets, scales, zeros, self.spec), scales, zeros


class FloatSignRounding(SignRounding):
    """One weight [out, in] on NVFP4 or MXFP4, with a share of each block's largest value.

    amax  [1, 1] of all that has its global scale (NVFP4)
    """

    def __init__(
        self, weight: Tensor, spec: QuantSpec, *, ranges: bool, amax: Tensor | None
    ) -> None:
        self.spec = spec
        self.groups = weight.float().view(*spec.scale_shape(*weight.shape), -1)
        self.largest = self.groups.abs().amax(-1)
        self.divisor = None if amax is None else global_divisor(amax)
        self.offsets = torch.zeros_like(self.groups).requires_grad_()
        self.shares = [torch.ones_like(self.largest).requires_grad_(ranges)]

    def weight(self) -> Tensor:
        elements, scales = self._elements()
        made = (elements * scales[..., None]).flatten(1)
        return made if self.divisor is None else made * (1 / self.divisor)

    @torch.no_grad()
    def quantized(self) -> QTensor:
        second = None if self.divisor is None else 1 / self.divisor
        return floats_qtensor(*self._elements(), second, self.spec)

    def _elements(self) -> tuple[Tensor, Tensor]:
        scales = learned_scales(self.largest, self.shares[0], self.divisor)
        return learned_elements(self.groups, self.offsets, scales, self.divisor), scales


def sign_rounding(
    weight: Tensor, spec: QuantSpec, *, ranges: bool, amax: Tensor | None
) -> SignRounding:
    """What is learned of a weight [out, in] on its grid."""
    if spec.element == "int":
        return SignRounding(weight, spec, ranges=ranges)
    return FloatSignRounding(weight, spec, ranges=ranges, amax=amax)


def _descend(roundings: dict[str, SignRounding], length: float) -> None:
    for rounding in roundings.values():
        rounding.descend(length)
