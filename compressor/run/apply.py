"""The passes of one unit, in order. Statistics are taken just before the first pass that reads
them, and anew once a pass has changed what can be observed."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from compressor_calibration.stats import SiteStats, StatNeeds
from torch import Tensor

from compressor.ir.unit import Unit
from compressor.methods.base import ModelPass, Pass
from compressor.methods.common.context import PassContext
from compressor.methods.common.learned import Learned
from compressor.plan.order import fitted_of, rounding_of
from compressor.plan.plan import Plan
from compressor.plan.unit_plan import Observable, UnitPlan
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.observe import Observation
from compressor.runner.tunable_block import TunableBlock

Tune = Callable[[Unit], TunableBlock]
"""The block of a unit as it stands, to be run with gradients."""

BlockProgress = Callable[[int, int, float], None]
"""Told how many steps of a unit are done, of how many, and the loss."""

Observe = Callable[[Unit, bool, Observable], Observation]
"""Runs the calibration inputs through a unit as it stands; the flag says whether any pass has
changed it."""

NOT_FINITE = "input vectors were not finite and are left out of all statistics"
NOWHERE: Mapping[int, int] = MappingProxyType({})

ObserveSite = Callable[[Unit, Unit, str, StatNeeds], SiteStats]
"""Runs them through a unit before anything was rounded and through it as it stands, each on its own
activations, and looks at one site."""


def apply_passes(
    plan: Plan,
    index: int,
    unit: UnitPlan,
    current: Unit,
    *,
    observe: Observe,
    observe_site: ObserveSite | None = None,
    tune: Tune | None = None,
    progress: BlockProgress = lambda done, total, loss: None,
    learned: Mapping[int, Learned],
    base: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
    homes: Mapping[int, int] = NOWHERE,
) -> tuple[Unit, list[dict[str, Any]]]:
    """The unit after its passes, and their report rows.

    index    of the unit in the plan
    current  the unit before them, in float32
    learned  what model passes found, by the index of the pass
    base     weights of the base model that a pass names
    ranks    that work on the unit;  homes  experts that one of them has alone
    """
    rows: list[dict[str, Any]] = []
    rounding = rounding_of(plan.passes, [linear.name for linear in unit.layout.linears])
    fitted = fitted_of(plan.passes)
    seen: Observation | None = None
    changed = False
    exact: Unit | None = None  # after the transforms, before the first rounding
    experts = {x.name: x.expert for x in unit.layout.linears if x.expert is not None}
    for number, wanted in zip(unit.steps, unit.seen, strict=True):
        step = plan.passes[number]
        params, needs = step.step.params, step.needs.stats
        left_out: list[int] = []
        if wanted.anything and seen is None:
            seen = observe(current, changed, wanted)
            left_out.append(seen.left_out)
        if exact is None or step.effects.transforms:
            exact = None if step.effects.transforms else current
        site = None
        if exact is not None and observe_site is not None and needs.cross:
            site = partial(_look, observe_site, needs, left_out, exact)
        context = PassContext(
            stats={} if seen is None else seen.stats,
            schemes=plan.schemes.linears,
            selected=tuple(x for x in unit.layout.linears if x.name in step.names),
            module_loss=_unseen if seen is None else seen.module_loss,
            seed=unit_seed(plan.recipe.seed, index, number),
            rounding=rounding,
            fitted=fitted,
            model_type=plan.layout.model_type,
            kv=None if seen is None else seen.kv,
            cache=plan.schemes.kv,
            base=base or {},
            observe=site,
            tune=tune if wanted.block else None,
            progress=progress,
            ranks=ranks,
            homes=homes,
        )
        if isinstance(params, ModelPass):
            result = params.apply(current, context, learned[number])
        elif isinstance(params, Pass):
            result = params.apply(current, context)
        else:
            continue
        rows.extend(
            {"pass": step.step.name, **row, **_coverage(row, experts, seen)} for row in result.rows
        )
        if any(left_out):
            noted = {"note": NOT_FINITE, "noted": sum(left_out)}
            rows.append({"pass": step.step.name, "unit": unit.layout.name, **noted})
        if result.unit is not current:
            changed = True
            if step.effects.stale:
                seen = None
        current = result.unit
    return current, rows


def _look(
    observe_site: ObserveSite,
    needs: StatNeeds,
    left_out: list[int],
    exact: Unit,
    unit: Unit,
    site: str,
) -> SiteStats:
    stats = observe_site(exact, unit, site, needs)
    left_out.append(stats.bad_tokens)
    return stats


def _coverage(
    row: Mapping[str, Any], experts: Mapping[str, int], seen: Observation | None
) -> dict[str, Any]:
    """What a report row of an expert's linear says of the tokens that the router sent there."""
    expert = experts.get(str(row.get("linear")))
    routed = None if seen is None or expert is None else seen.routed.get(expert)
    return {} if routed is None else {"expert": expert, "routed": routed}


def unit_seed(seed: int, unit: int, step: int) -> int:
    """A seed of its own for each unit and pass, so that redoing one gives the same bytes."""
    digest = hashlib.sha256(f"{seed}/{unit}/{step}".encode()).digest()
    return int.from_bytes(digest[:6], "little")


def _unseen(site: str, weights: Mapping[str, Any]) -> float:
    raise RuntimeError(f"{site} was not observed")
