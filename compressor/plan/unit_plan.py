"""What a run does in one unit: which passes, what they read of it, and what is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from compressor_calibration.stats import KVNeeds, StatNeeds

from compressor.checkpoint.target import Target
from compressor.ir.layout import UnitLayout
from compressor.ir.tensor import TensorShape
from compressor.methods.base import BlockNeeds, Cost, Effects, Needs
from compressor.methods.common.context import PlanContext
from compressor.plan.recipe import Step

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
    """What a pass reads: input site → statistics, what of keys and values, if anything; and how it
    runs the block with gradients, if it does."""

    sites: Mapping[str, StatNeeds]
    kv: KVNeeds | None = None
    block: BlockNeeds | None = None

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
        """Whether any step reads statistics, or runs the block."""
        return bool(self.needs) or any(wanted.anything or wanted.block for wanted in self.seen)

    @property
    def tuned(self) -> bool:
        """Whether any step runs the block with gradients."""
        return any(wanted.block for wanted in self.seen)


def plan_unit(
    unit: UnitLayout, passes: Sequence[PassPlan], target: Target, *, beside: bool = False
) -> UnitPlan:
    """What `passes` do in a unit of a target.

    beside  whether the original's activations run beside the quantized model's: a pass that reads
            both looks at its sites one after the other, and not at all of them before
    """
    names = {linear.name for linear in unit.linears}
    steps = tuple(
        i
        for i, plan in enumerate(passes)
        if plan.names & names or (plan.effects.works_on == "all" and unit.kind != "beside")
    )
    chosen = [passes[i] for i in steps]
    seen = _observables(unit, chosen, beside=beside and unit.kind == "block")
    needs: dict[str, StatNeeds] = {}
    for plan in chosen:
        needs = _merged(needs, _sites(unit, plan, beside=False))
    return UnitPlan(layout=unit, steps=steps, needs=needs, seen=seen, outputs=target.shapes(unit))


def _sites(unit: UnitLayout, plan: PassPlan, *, beside: bool) -> dict[str, StatNeeds]:
    """Input site → statistics of it that a pass reads; with `beside` without those that it takes
    later, from both models."""
    stats = plan.needs.stats
    found = {}
    for x in unit.linears:
        later = beside and stats.cross and x.expert is None
        wanted = replace(stats, gram=False, cross=False) if later else stats
        if x.name in plan.names and wanted != StatNeeds():
            found[x.site] = wanted
    return found


def _observables(
    unit: UnitLayout, plans: Sequence[PassPlan], *, beside: bool
) -> tuple[Observable, ...]:
    """What has to be observed before each step, if what was seen before is stale by then."""
    found: list[Observable] = []
    for plan in reversed(plans):
        needs = plan.needs
        sites = _sites(unit, plan, beside=beside)
        kv = None if unit.attention is None else needs.kv
        # What changes what is seen need not look ahead: everything is observed anew after it.
        if found and not plan.effects.stale:
            later = found[-1].kv
            kv = kv | later if kv and later else kv or later
            sites = _merged(sites, found[-1].sites)
        block = needs.block if unit.kind == "block" else None
        found.append(Observable(sites=sites, kv=kv, block=block))
    return tuple(reversed(found))


def _merged(ours: Mapping[str, StatNeeds], theirs: Mapping[str, StatNeeds]) -> dict[str, StatNeeds]:
    return {
        site: ours.get(site, StatNeeds()) | theirs.get(site, StatNeeds())
        for site in dict.fromkeys([*ours, *theirs])
    }
