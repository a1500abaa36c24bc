"""A unit before anything is rounded: as passes begin with it, and as the original runs beside what
is written."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compressor.ir.floats import Floats, Moved
from compressor.ir.unit import Unit
from compressor.methods.common.learned import Learned
from compressor.plan.plan import Plan
from compressor.plan.unit_plan import Observable
from compressor.run.apply import apply_passes
from compressor.run.model_passes import Outcome
from compressor.runner.observe import Observation


def start_of(
    plan: Plan,
    index: int,
    source: Unit,
    moved: Mapping[str, Tensor],
    learned: Mapping[int, Outcome],
    *,
    device: torch.device,
) -> Unit:
    """A unit in float32, as passes work on it, with what model passes add to it.

    moved  its tensors on the device, or such as are brought there
    """
    unit = plan.units[index]
    added = {
        name: tensor
        for found in learned.values()
        for name, tensor in found.result.extra.items()
        if name in unit.outputs
    }
    tensors = dict(moved.tensors if isinstance(moved, Moved) else moved)
    extra = {**source.extra, **added}
    picked = {name for number in unit.steps for name in plan.passes[number].names}
    for linear in source.layout.linears:
        if linear.beside and linear.name in picked:
            weight = extra.pop(linear.weight_name, None)
            if weight is not None:
                tensors[linear.weight_name] = weight.to(device)
    floats = Floats(tensors, device=device if isinstance(moved, Moved) else None)
    return Unit(layout=source.layout, tensors=floats, extra=extra)


def rotated(
    plan: Plan, index: int, start: Unit, learned: Mapping[int, Outcome], *, dtype: torch.dtype
) -> Mapping[str, Tensor] | None:
    """The original's weights in the basis that hidden states have in the written model; None where
    that is its own. It follows from the weights alone, so that a resumed run finds it again."""
    unit = plan.units[index]
    places = [i for i, n in enumerate(unit.steps) if plan.passes[n].effects.rotates_residual]
    if not places:
        return None
    picked = replace(
        unit,
        steps=tuple(unit.steps[i] for i in places),
        seen=tuple(unit.seen[i] for i in places),
    )
    made, _ = apply_passes(
        plan, index, picked, start, observe=not_observed, learned=values_of(learned)
    )
    return in_dtype(made.dequantized(), dtype)


def values_of(learned: Mapping[int, Outcome]) -> dict[int, Learned]:
    """What model passes learned, by the index of the pass."""
    return {number: found.result.value for number, found in learned.items()}


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The same tensors in another dtype, those that wait elsewhere when they are read."""
    if isinstance(tensors, Floats) and tensors.device is not None:
        return Moved(tensors, tensors.device, dtype)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def not_observed(current: Unit, changed: bool, wanted: Observable) -> Observation:
    """What observes a unit that no calibration token goes through."""
    raise AssertionError(f"{current.layout.name} is not calibrated")
