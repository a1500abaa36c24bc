"""Memory that `verify` takes, from shapes alone."""

import math

import torch

from compressor.ir.layout import UnitLayout
from compressor.numerics.chunks import CODED_AHEAD, layers_ahead
from compressor.plan.plan import Plan
from compressor.runner.expert_groups import experts_at_once


def verifying_bytes(plan: Plan, device: torch.device) -> tuple[int, int]:
    """Main memory and the device's: the largest written unit beside the original's, both as they
    are stored, with some of its layers in float64 or all that is no expert's in float32."""
    if not plan.recipe.verify:
        return 0, 0
    cpu = device.type == "cpu"
    most = most_there = 0
    for unit in plan.units:
        schemes, layout = plan.schemes.linears, unit.layout
        shapes = [x.shape for x in layout.linears if schemes[x.name].weight is not None]
        single = [x for x in layout.linears if x.expert is None]
        stored = sum(source_bytes(plan, layout, carried=False))
        written = sum(spec.nbytes for spec in unit.outputs.values())
        largest = max(map(math.prod, shapes), default=0)
        experts = sum(math.prod(x.shape) for x in layout.linears if x.expert is not None)
        # Both checkpoints' in float32, and codes of what is packed; of experts a group that runs.
        compared = 8 * max(parameters(plan, layout) - experts, 0)
        compared += sum(math.prod(x.shape) for x in single if schemes[x.name].weight is not None)
        compared += _group_in_float32(plan, layout)
        if any(step.effects.rotates_residual for step in plan.passes):
            compared += 4 * experts
        # Both readers' weights are there. Linears that read one input are rescaled, and a
        # difference is as large as its layer.
        compared += 16 * largest
        if cpu:
            checked = 8 * (layers_ahead((1, largest)) + 2) * largest if shapes else 0
            most = max(most, written + max(checked, stored + compared))
            continue
        # Both checkpoints' next unit is read meanwhile, and layers are there as codes.
        layers = layers_ahead((1, largest), CODED_AHEAD, width=1) + 1 if shapes else 0
        most = max(most, 2 * (written + stored + layers * largest))
        most_there = max(most_there, written + max(compared, layers * largest + 16 * largest))
    return most, most_there


def _group_in_float32(plan: Plan, unit: UnitLayout) -> int:
    """Experts that run at a time, once more where their rows or axes lie otherwise in memory."""
    if not unit.experts:
        return 0
    each = sum(math.prod(x.shape) for x in unit.linears if x.expert is not None) // unit.experts
    turned = any(x.interleaved or x.transposed for x in plan.source.arch.runtime.stacks)
    return 4 * each * experts_at_once(unit) * (1 + turned)


def source_bytes(plan: Plan, unit: UnitLayout, *, carried: bool = True) -> list[int]:
    """Of each tensor of a unit as it is read."""
    entries = plan.source.checkpoint.entries
    return [entries[name].spec.nbytes for name in plan.source.names(unit, carried=carried)]


def parameters(plan: Plan, unit: UnitLayout) -> int:
    """Numbers that a unit's forward pass uses, as many as are stored for them."""
    entries = plan.source.checkpoint.entries
    names = plan.source.names(unit, carried=False)
    return sum(math.prod(entries[name].spec.shape) for name in names)
