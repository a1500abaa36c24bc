"""Exact rescaling of an input site: what makes the input is divided by a scale, what reads it is
multiplied by it, so the model computes the same function.

Scales are given per source channel. Where several query heads read one value head, the consumer's
columns take the head's scale once for each of them.
"""

from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.floats import Change
from compressor.ir.layout import Fold, Rows, UnitLayout, bias_name, weight_name


def fold(
    tensors: Mapping[str, Tensor],
    fold: Fold,
    unit: UnitLayout,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The tensors that change when the site of `fold` is rescaled; `tensors` is left as it is.

    tensors  checkpoint name → float tensor, with the fold's source and all linears of its site
    scale    [source channels], positive and finite
    dtype    of the arithmetic; results have the dtype of what they replace

    Raises ValueError for a scale of the wrong length or sign and for a tensor that is not there,
    InputError where a result is too large for the tensor's dtype.
    """
    changes = fold_changes(tensors, fold, unit, scale, dtype=dtype)
    return {name: change(tensors[name]) for name, change in changes.items()}


def fold_changes(
    names: Container[str],
    fold: Fold,
    unit: UnitLayout,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    positive: bool = False,
) -> dict[str, Change]:
    """What `fold` does to each tensor that it changes, to be done when that is needed.

    names     of the float tensors that there are
    positive  the scale is known to be positive and finite: to look waits for the device
    """
    good = positive or bool(((scale > 0) & scale.isfinite()).all())
    if scale.dim() != 1 or not good:
        raise ValueError(f"the scale of {fold.source} is not a vector of positive finite numbers")
    scale = scale.to(dtype)
    columns = consumer_scale(fold, scale)

    weight, bias = weight_name(fold.source), bias_name(fold.source)
    changes: dict[str, Change] = {
        name: Divided(name, scale, fold.rows, fold.norm_offset if name == weight else 0.0)
        for name in (weight, bias)
        if name in names
    }
    for linear in unit.site_linears(fold.site):
        changes[linear.weight_name] = Rescaled(linear.weight_name, columns)
    for name in (weight, *changes):
        if name not in names:
            raise ValueError(f"folding into {fold.site} needs {name}, which is not a float tensor")
    return changes


@dataclass(frozen=True, slots=True, eq=False)
class Divided:
    """What `fold` does to the tensor that makes the input: rows are divided by the scale.

    rows    that make it, if not all;  offset  that its reader adds to it
    """

    name: str
    scale: Tensor
    rows: Rows | None
    offset: float

    def __call__(self, tensor: Tensor) -> Tensor:
        value = tensor.to(self.scale.dtype)
        rows = self.rows or Rows("", 0, value.shape[0])
        if self.scale.shape[0] != rows.total:
            raise ValueError(
                f"{self.scale.shape[0]} scales for {rows.total} channels of {self.name}"
            )
        by = self.scale.to(value.device).view(-1, *[1] * (value.dim() - 1))
        made = (rows.take(value) + self.offset).div_(by).sub_(self.offset)
        if self.rows is not None:
            made = rows.put(value, made)
        return _cast(self.name, made, tensor.dtype, self.scale)

    @property
    def kind(self) -> Hashable:
        """As in `Rescaled`."""
        return self if self.rows is not None else (Divided, self.offset)

    def of_each(self, every: Sequence[Self], stack: Tensor) -> Tensor:
        """As in `Rescaled`."""
        by = torch.stack([change.scale for change in every]).unsqueeze(-1).to(stack.device)
        made = (stack.to(by.dtype) + self.offset).div_(by).sub_(self.offset)
        return made.to(stack.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Rescaled:
    """What `fold` does to the weight [out, in] of a linear that reads the site, with the scales
    [in] of `consumer_scale`."""

    name: str
    columns: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """Raises as `fold` does."""
        value = weight.to(self.columns.dtype)
        if self.columns.shape[0] != value.shape[1]:
            raise ValueError(
                f"{self.columns.shape[0]} scales for {value.shape[1]} inputs of {self.name}"
            )
        made = value * self.columns.to(value.device)
        return _cast(self.name, made, weight.dtype, self.columns)

    @property
    def kind(self) -> Hashable:
        """Equal for changes that `of_each` does together."""
        return Rescaled

    def of_each(self, every: Sequence[Self], stack: Tensor) -> Tensor:
        """Every change done to its weight of a stack [E, out, in] in the dtype of the scales: the
        same bits in fewer steps."""
        by = self.columns
        if any(change.columns is not by for change in every):
            by = torch.stack([change.columns for change in every]).unsqueeze(-2)
        return (stack * by.to(stack.device)).to(stack.dtype)


def _cast(name: str, value: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    made = value.to(dtype)
    if dtype == torch.float16 and not bool(made.isfinite().all()):
        raise InputError(
            f"rescaling by {scale.min():.3g} to {scale.max():.3g} takes {name} beyond float16",
            hint="use the bfloat16 or float32 model, or a weaker scaling",
        )
    return made


def consumer_scale(fold: Fold, scale: Tensor) -> Tensor:
    """The scale of each consumer column, [columns], for a scale per source channel, [channels]."""
    if fold.repeat == 1:
        return scale
    return scale.view(-1, 1, fold.head_dim).expand(-1, fold.repeat, -1).reshape(-1)


def source_scale(
    fold: Fold, per_consumer_scale: Tensor, reduce: Literal["max", "mean"] = "max"
) -> Tensor:
    """One scale per source channel from one per consumer column, [columns] → [channels].

    The query heads that read one value head must agree: their scales are reduced to the largest
    or to the mean.
    """
    if fold.repeat == 1:
        return per_consumer_scale
    heads = per_consumer_scale.view(-1, fold.repeat, fold.head_dim)
    return (heads.amax(1) if reduce == "max" else heads.mean(1)).reshape(-1)
