"""Channels of like salience side by side (QoQ, arXiv 2405.04532; also GPTQ's activation order, made
static).

The input channels of a linear are put in the order of the largest value that calibration saw in
them, so that a quantization group holds channels that matter alike. What makes them, the value
projection or the gate and up projections, has its rows in the same order, so nothing has to be
reordered when the model runs. Channels of a head stay in it, and query heads that share a value
head share its order.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from compressor_calibration.stats import StatNeeds
from pydantic import Field
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.layout import AttentionShape, Linear, Rows, UnitLayout
from compressor.ir.rows import change_rows, parts_of
from compressor.ir.unit import Unit
from compressor.methods.base import Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.methods.common.shapes import refused
from compressor.numerics.channel_order import head_order, salience_order


class Reorder(Pass):
    """Sort the channels between v and o and between up and down projections by their salience."""

    version: ClassVar[int] = 2

    targets: str | list[str] = Field(
        default=["attn.o", "*.down"], description="linears whose input channels are sorted"
    )
    by: Literal["absmax", "absmean"] = Field(
        "absmax", description="what of a channel's values says how much it matters"
    )

    def needs(self) -> Needs:
        return Needs(stats=StatNeeds(absmax=self.by == "absmax", absmean=self.by == "absmean"))

    def check(self, context: PlanContext) -> Iterator[InputError]:
        def reason(linear: Linear) -> str | None:
            if linear.role.endswith(".down"):
                return None
            if linear.role != "attn.o":
                return "only o and down projections can be reordered without changing other blocks"
            if linear in gated:
                return (
                    "a gate for each of its inputs would stay as it is; targets: '*.down' would do"
                )
            return None if linear in by_head else "its inputs are not values by head of this block"

        units = [
            unit
            for unit in context.layout.units
            if unit.attention is not None and not unit.attention.shared and parts_of(unit, "attn.v")
        ]
        by_head = {linear for unit in units for linear in unit.linears}
        gated = {x for unit in units if parts_of(unit, "attn.gate") for x in unit.linears}
        return refused(context.selected, reason)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        rows = []
        for linear in context.selected:
            stats = context.stats[linear.site]
            salience = stats.absmax if self.by == "absmax" else stats.absmean
            if not bool(salience.any()):
                continue  # an expert that saw no token has no order to prefer
            order = _order(unit.layout, linear, salience)
            for source, part, change in _sources(unit.layout, linear, order):
                unit = unit.with_tensors(change_rows(unit.tensors, source, part, change))
            columns = _columns(unit.layout, linear, order)
            unit = unit.with_weight(linear, unit.weight(linear)[:, columns])
            moved = order != torch.arange(order.shape[-1], device=order.device)
            rows.append({"linear": linear.name, "moved": int(moved.sum())})
        return PassResult(replace(unit, divisors={}), rows)


def _order(layout: UnitLayout, linear: Linear, salience: Tensor) -> Tensor:
    """[channels], or [kv_heads, head_dim] for an output projection of attention."""
    if linear.role != "attn.o":
        return salience_order(salience)
    shape = _heads(layout)
    return head_order(salience, head_dim=shape.head_dim, repeat=shape.heads // shape.kv_heads)


def _heads(layout: UnitLayout) -> AttentionShape:
    if layout.attention is None:
        raise InputError(f"{layout.name} has no values by head")
    return layout.attention


def _columns(layout: UnitLayout, linear: Linear, order: Tensor) -> Tensor:
    """Which input comes at each place of the reordered linear."""
    if linear.role != "attn.o":
        return order
    shape = _heads(layout)
    heads = order.repeat_interleave(shape.heads // shape.kv_heads, 0)
    starts = torch.arange(shape.heads, device=order.device)[:, None] * shape.head_dim
    return (heads + starts).reshape(-1)


def _sources(
    layout: UnitLayout, linear: Linear, order: Tensor
) -> list[tuple[Linear, Rows, Callable[[Tensor], Tensor]]]:
    """What makes the channels: a linear, the rows in question, and how they are permuted."""
    places = order
    if linear.role == "attn.o":
        roles: tuple[str, ...] = ("attn.v",)
        starts = torch.arange(order.shape[0], device=order.device)[:, None] * order.shape[1]
        places = (order + starts).reshape(-1)
    else:
        kind = linear.role.removesuffix("down")
        roles = (f"{kind}gate", f"{kind}up")

    def change(rows: Tensor) -> Tensor:
        return rows[places.to(rows.device)]

    found = parts_of(layout, *roles)
    return [(x, part, change) for x, part in found if x.expert == linear.expert]
