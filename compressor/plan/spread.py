"""Blocks of which each of several ranks may have some experts alone, where one has no room for all.

Shapes and the recipe decide it, so that all ranks know.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from compressor.errors import CompressError
from compressor.ir.same_shape import homes
from compressor.methods.base import Pass
from compressor.plan.plan import Plan
from compressor.plan.unit_plan import UnitPlan


def spread_units(plan: Plan, world: int) -> frozenset[int]:
    """Their indices among the units; none where a method, or the way in which experts are stored or
    run, wants all of a block in one place."""
    stacks = plan.source.arch.runtime.stacks
    plain = not any(x.transposed or x.interleaved or x.bias for x in stacks)
    if (
        not plain
        or plan.source.quantized
        or plan.two_streams
        or plan.recipe.propagate != "quantized"
    ):
        return frozenset()
    found = frozenset(i for i, unit in enumerate(plan.units) if _spreads(plan, unit, world))
    return found if found and _divisible(plan) else frozenset()


def working_bytes(
    plan: Plan, works: Callable[[UnitPlan], int], *, room: float, world: int
) -> tuple[int, int]:
    """What one of so many ranks takes of its device for the largest unit; and, where that is less
    than what one alone would take, because it has no room for that, the latter, else 0.

    works  what a unit takes
    """
    sizes = [works(unit) for unit in plan.units]
    whole = max(sizes)
    spread = spread_units(plan, world) if whole > room else frozenset()
    for i in spread:
        sizes[i] = works(_part(plan.units[i], world))
    return max(sizes), whole if spread else 0


def memory_of(device: torch.device) -> float:
    """Bytes of a GPU; infinity where there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return math.inf
    return float(torch.cuda.get_device_properties(device).total_memory)


def _part(unit: UnitPlan, world: int) -> UnitPlan:
    """What the rank that has most experts of a block works on."""
    linears = unit.layout.linears
    home = list(homes(linears, world).items())
    most = max(range(world), key=[rank for _, rank in home].count)
    others = {expert for expert, rank in home if rank != most}
    left_out = {x.name for x in linears if x.expert in others}

    def here(name: str) -> bool:
        return name.rpartition(".")[0] not in left_out

    layout = replace(
        unit.layout,
        linears=tuple(x for x in linears if x.name not in left_out),
        tensors=tuple(filter(here, unit.layout.tensors)),
    )
    outputs = {name: spec for name, spec in unit.outputs.items() if here(name)}
    return replace(unit, layout=layout, outputs=outputs)


def _divisible(plan: Plan) -> bool:
    """Whether what the family's experts make of a token is added up so that ranks may share them:
    asked of transformers' model, on the meta device."""
    from compressor.runner.block_runner import BlockRunner  # with imports of seconds
    from compressor.runner.experts import divisible

    names = plan.source.arch.runtime
    try:
        runner = BlockRunner(
            plan.source.checkpoint.config, names, device=torch.device("cpu"), dtype=torch.float32
        )
    except CompressError:
        return False  # what is wrong with the model is told where it is tried
    layer = runner.layers[next(u.index for u in plan.layout.blocks if u.experts)]
    return all(divisible(layer.get_submodule(path)) for path in names.expert_modules)


def _spreads(plan: Plan, unit: UnitPlan, world: int) -> bool:
    experts = [x for x in unit.layout.linears if x.expert is not None]
    passes = [plan.passes[number] for number in unit.steps]
    schemes = {plan.schemes.linears[x.name] for x in experts}
    return (
        unit.layout.kind == "block"
        and unit.calibrated
        and not unit.tuned
        and bool(homes(experts, world))
        and all(isinstance(p.step.params, Pass) and p.step.params.spreads() for p in passes)
        and all(x.name in p.names for p in passes for x in experts)
        and len(schemes) == 1
        and all(plan.target.packs(x) for x in experts)
        and not plan.source.arch.runtime.stacked(unit.layout)
    )
