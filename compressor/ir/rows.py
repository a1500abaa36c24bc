"""Rows of a unit's linears by the role they play, whether the linear is fused or not."""

from collections.abc import Callable, Mapping

from torch import Tensor

from compressor.ir.layout import Linear, Rows, UnitLayout


def parts_of(unit: UnitLayout, *roles: str) -> list[tuple[Linear, Rows]]:
    """The rows with these roles, in the order of the linears."""
    return [
        (linear, rows)
        for linear in unit.linears
        for rows in linear.rows or (Rows(linear.role, 0, linear.out_features),)
        if rows.role in roles
    ]


def change_rows(
    tensors: Mapping[str, Tensor],
    linear: Linear,
    part: Rows,
    change: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """A linear's weight and bias with the rows of one role changed; `tensors` stays as it is.

    change  rows [part, in] of the weight or [part] of the bias → the same shape
    """
    changed = {}
    for name in (linear.weight_name, linear.bias_name):
        if name in tensors:
            value = tensors[name]
            changed[name] = part.put(value, change(part.take(value)).to(value.dtype))
    return changed
