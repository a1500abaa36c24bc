"""What a run does in one unit: which passes, what they read of it, and what is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from compressor_calibration.stats import KVNeeds, StatNeeds

from compressor.checkpoint.source import Source
from compressor.formats.base import Format, ModelSchemes
from compressor.ir.layout import UnitLayout
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape
from compressor.methods.base import Cost, Effects, ModelPass, Needs
from compressor.methods.common.context import PlanContext
from compressor.plan.recipe import Recipe, Step

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class PassPlan:
    """One pass over the whole model.

    matches  target pattern → how many linears it means;  ignored  the same for `ignore`
    context  what it is told
    """

    step: Step
    matches: Mapping[str, int]
    ignored: Mapping[str, int]
    context: PlanContext

    @cached_property
    def names(self) -> frozenset[str]:
        """The linears it works on."""
        return frozenset(linear.name for linear in self.context.selected)

    @cached_property
    def effects(self) -> Effects:
        """What it does."""
        return self.step.params.effects()

    @cached_property
    def needs(self) -> Needs:
        """What it reads."""
        return self.step.params.needs()

    def cost(self, dtype: torch.dtype) -> Cost:
        """What it takes where the model runs in `dtype`."""
        return self.step.params.cost(self.context, dtype)


@dataclass(frozen=True, slots=True)
class Observable:
    """What a pass reads: input site → statistics, and what of keys and values, if anything."""

    sites: Mapping[str, StatNeeds]
    kv: KVNeeds | None = None

    @property
    def anything(self) -> bool:
        """Whether tokens have to be run for it."""
        return bool(self.sites) or self.kv is not None


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """One unit: what passes select in it, which statistics they read, what it writes.

    steps    indices into Plan.passes of those that change something here, in order
    needs    input site → statistics that any of them reads
    seen     for each step, what is to be observed if nothing fresh is there when its turn comes:
             what it and those after it read, up to the next that changes what can be observed
    outputs  tensor name → dtype and shape, in the order of the shards
    """

    layout: UnitLayout
    steps: tuple[int, ...]
    needs: Mapping[str, StatNeeds]
    seen: tuple[Observable, ...]
    outputs: Mapping[str, TensorShape]

    @property
    def calibrated(self) -> bool:
        """Whether any step reads statistics."""
        return any(wanted.anything for wanted in self.seen)


def plan_unit(
    unit: UnitLayout,
    passes: Sequence[PassPlan],
    model: ModelSchemes,
    source: Source,
    recipe: Recipe,
    fmt: Format,
    dtype: torch.dtype,
) -> UnitPlan:
    names = {linear.name for linear in unit.linears}
    steps = tuple(
        i for i, plan in enumerate(passes) if plan.names & names or plan.effects.works_on == "all"
    )
    seen = _observables(unit, [passes[i] for i in steps])
    needs: dict[str, StatNeeds] = {}
    for wanted in seen:
        needs = _merged(needs, wanted.sites)
    outputs: dict[str, TensorShape] = {}
    by_weight = {linear.weight_name: linear for linear in unit.linears}
    tensors = list(unit.tensors)
    untie = unit.kind == "head" and recipe.untie and source.layout.tied is not None
    if untie:
        tensors += [linear.weight_name for linear in unit.linears]
    for name in tensors:
        found = by_weight.get(name)
        scheme = model.linears[found.name] if found else Scheme()
        if found is not None and scheme.weight is not None:
            local = fmt.layout(scheme.weight, found.shape, model_dtype=dtype, input=scheme.input)
            outputs.update({f"{found.name}.{leaf}": spec for leaf, spec in local.items()})
        elif found is not None:
            outputs[name] = TensorShape(float_dtype(name, source, recipe, dtype), found.shape)
        elif name in unit.others:
            outputs[name] = source.checkpoint.entries[name].spec
        else:
            shape = source.checkpoint.entries[name].spec.shape
            outputs[name] = TensorShape(float_dtype(name, source, recipe, dtype), shape)
    for stack, linears in unit.stacks.items():
        # Runtimes look up packed experts one by one, and floats in the stack they came in.
        if all(model.linears[linear.name].weight is None for linear in linears):
            outputs = _restacked(outputs, stack, unit, source)
    for plan in passes:
        if isinstance(plan.step.params, ModelPass):
            outputs |= plan.step.params.adds(source.layout, dtype).get(unit.name, {})
    if model.kv is not None and model.kv.element != "int4" and unit.attention is not None:
        heads = unit.attention.kv_heads if model.kv.per == "head" else 1
        scale = torch.empty(heads, device="meta")
        stored = fmt.kv_tensors(
            model.kv, unit.attention_path, k_scale=scale, v_scale=scale, model_dtype=dtype
        )
        for name, tensor in stored.items():
            outputs[name] = TensorShape(dtype=tensor.dtype, shape=tuple(tensor.shape))
    for name in source.added.get(unit.name, ()):
        # Scales of a quantized cache belong to the config that declared it, which is not carried.
        if not name.endswith((".k_scale", ".v_scale")):
            outputs.setdefault(name, source.checkpoint.entries[name].spec)
    return UnitPlan(layout=unit, steps=steps, needs=needs, seen=seen, outputs=outputs)


def _restacked(
    outputs: Mapping[str, TensorShape], stack: str, unit: UnitLayout, source: Source
) -> dict[str, TensorShape]:
    """The outputs with a stack of experts in place of its parts."""
    state = {
        name: torch.empty(shape.shape, dtype=shape.dtype, device="meta")
        for name, shape in outputs.items()
    }
    parts, built = source.arch.runtime.restacked(unit, stack, state)
    rest = {name: shape for name, shape in outputs.items() if name not in parts}
    return rest | {n: TensorShape(t.dtype, tuple(t.shape)) for n, t in built.items()}


def _observables(unit: UnitLayout, plans: Sequence[PassPlan]) -> tuple[Observable, ...]:
    """What has to be observed before each step, if what was seen before is stale by then."""
    found: list[Observable] = []
    for plan in reversed(plans):
        needs, names = plan.needs, plan.names
        read = needs.stats != StatNeeds()
        sites = {x.site: needs.stats for x in unit.linears if read and x.name in names}
        kv = None if unit.attention is None else needs.kv
        # What changes what is seen need not look ahead: everything is observed anew after it.
        if found and not plan.effects.stale:
            later = found[-1].kv
            kv = kv | later if kv and later else kv or later
            sites = _merged(sites, found[-1].sites)
        found.append(Observable(sites=sites, kv=kv))
    return tuple(reversed(found))


def _merged(ours: Mapping[str, StatNeeds], theirs: Mapping[str, StatNeeds]) -> dict[str, StatNeeds]:
    return {
        site: ours.get(site, StatNeeds()) | theirs.get(site, StatNeeds())
        for site in dict.fromkeys([*ours, *theirs])
    }


def float_dtype(name: str, source: Source, recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """A float tensor keeps its own dtype unless the recipe or the format asks for one."""
    entry = source.checkpoint.entries.get(name)
    kept = recipe.dtype == "auto" and dtype == source.checkpoint.dtype
    if kept and entry is not None and entry.spec.dtype in DTYPES.values():
        return entry.spec.dtype
    return dtype


def module_groups(outputs: Mapping[str, TensorShape]) -> list[dict[str, TensorShape]]:
    """Tensors that must lie in one shard: those of one module."""
    modules: dict[str, dict[str, TensorShape]] = {}
    for name, spec in outputs.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = spec
    return list(modules.values())
