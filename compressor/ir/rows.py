"""Rows of a unit's linears by the role they play, whether the linear is fused or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compressor.ir.layout import Linear, Part, UnitLayout


def parts_of(unit: UnitLayout, *roles: str) -> list[tuple[Linear, Part]]:
    """The row ranges with these roles, in the order of the linears."""
    return [
        (linear, part)
        for linear in unit.linears
        for part in linear.parts or (Part(linear.role, 0, linear.out_features),)
        if part.role in roles
    ]


def change_rows(
    tensors: Mapping[str, Tensor],
    linear: Linear,
    part: Part,
    change: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """A linear's weight and bias with the rows of one part changed; `tensors` stays as it is.

    change  rows [part, in] of the weight or [part] of the bias → the same shape
    """
    changed = {}
    for name in (linear.weight_name, linear.bias_name):
        if name in tensors:
            value = tensors[name]
            rows = change(value[part.start : part.stop]).to(value.dtype)
            changed[name] = torch.cat([value[: part.start], rows, value[part.stop :]])
    return changed
