"""Where the weights of a unit lie while it is worked on: on the device, or those of experts in main
memory, from which they are brought there when they are read."""

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.checkpoint.source import Finite, whether_finite
from compressor.ir.floats import Moved, fill, room_for
from compressor.ir.unit import Unit
from compressor.plan.plan import Plan
from compressor.plan.unit_plan import UnitPlan
from compressor.run.settings import JobSettings

AT_ONCE = 16
"""Tensors that are brought to the device to look at them."""


def placed(
    plan: Plan, unit: UnitPlan, source: Unit, settings: JobSettings
) -> tuple[Mapping[str, Tensor], Finite]:
    """A unit's tensors in float on the device, those of experts when they are read if they lie
    apart; and whether they are finite. Where no pass looks at the unit first that is asked at once,
    and InputError is raised; to ask waits for the device, which looking does anyway."""
    layout, device = unit.layout, settings.device
    read = source.dequantized(plan.compute_dtype(device))
    paths: set[str] = set()
    if settings.experts_apart:
        paths = {x.name for x in layout.linears if x.expert is not None}
    if paths:
        here = {n: t for n, t in read.items() if n.rpartition(".")[0] not in paths}
        moved = Moved({**read, **fill(room_for(here, device), here)}, device)
        every = list(moved)
        for first in range(0, len(every), AT_ONCE):
            whether_finite({n: moved[n] for n in every[first : first + AT_ONCE]}).require()
        return moved, whether_finite({})
    here = fill(room(plan, unit, read, device), read)
    finite = whether_finite({n: t for n, t in here.items() if not t.is_meta})
    if not (unit.seen and unit.seen[0].anything):
        finite.require()
    return here, finite


def room(
    plan: Plan, unit: UnitPlan, tensors: Mapping[str, Tensor], device: torch.device
) -> Mapping[str, Tensor]:
    """Memory on the device for a unit's tensors, as they are worked on."""
    if unit.layout.kind == "block" and unit.calibrated and device.type == "cuda":
        return plan.source.arch.runtime.room(unit.layout, tensors, device)
    return room_for(tensors, device)
