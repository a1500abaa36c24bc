"""Where the weights of a unit lie while it is worked on: on the device, or those of experts in main
memory, from which they are brought there when they are read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compressor.checkpoint.source import require_finite
from compressor.ir.floats import Moved, on_device
from compressor.ir.unit import Unit
from compressor.plan.plan import Plan
from compressor.plan.unit_plan import UnitPlan
from compressor.run.settings import JobSettings

AT_ONCE = 16
"""Tensors that are brought to the device to look at them."""


def placed(plan: Plan, unit: UnitPlan, source: Unit, settings: JobSettings) -> Mapping[str, Tensor]:
    """A unit's tensors in float on the device, those of experts when they are read if they lie
    apart. Raises InputError where one is not finite."""
    layout, device = unit.layout, settings.device
    read = source.dequantized(plan.compute_dtype(device))
    paths: set[str] = set()
    if settings.experts_apart:
        paths = {x.name for x in layout.linears if x.expert is not None}
    moved: Mapping[str, Tensor]
    if paths:
        here = {
            name: t if name.rpartition(".")[0] in paths else t.to(device, non_blocking=True)
            for name, t in read.items()
        }
        moved = Moved(here, device)
        every = list(moved)
        for first in range(0, len(every), AT_ONCE):
            require_finite({name: moved[name] for name in every[first : first + AT_ONCE]})
        return moved
    if layout.kind == "block" and unit.calibrated and device.type == "cuda":
        moved = plan.source.arch.runtime.placed(layout, read, device)
    else:
        moved = {name: on_device(t, device) for name, t in read.items()}
    require_finite({name: t for name, t in moved.items() if not t.is_meta})
    return moved
