"""What each of several ranks does in a run: shapes alone decide, so a plan can say it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compressor.ir.layout import Linear
from compressor.ir.same_shape import homes
from compressor.methods.base import ModelPass
from compressor.plan.plan import Plan
from compressor.plan.spread import spread_units
from compressor.plan.unit_plan import UnitPlan
from compressor.ranks.divide import owners
from compressor.ranks.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part.

    rows     of calibration tokens
    units    that it works on alone, where no rows run through any; else None
    weights  that it searches for and rounds
    """

    rank: int
    rows: int
    units: int | None
    weights: int


def shares(plan: Plan, world: int, batch: int, *, spread: bool = False) -> list[Share]:
    """Every rank's part, on one host.

    batch   rows in one forward pass
    spread  whether each has some experts of a block alone, where that can be
    """
    ranks = [Ranks(rank=rank, world=world) for rank in range(world)]
    if not plan.calibrated:
        owned = [rank.mine(plan.units, output_bytes) for rank in ranks]
        return [
            Share(r, 0, len(own), sum(_size(x) for unit in own for x in _coded(plan, unit)))
            for r, own in enumerate(owned)
        ]
    weights = [0] * world
    alone = spread_units(plan, world) if spread else ()
    for index, unit in enumerate(plan.units):
        home = homes(unit.layout.linears, world) if index in alone else {}
        coded = _coded(plan, unit)
        fixed = [None if x.expert is None else home.get(x.expert) for x in coded]
        for linear, owner in zip(coded, owners([*map(_size, coded)], world, fixed), strict=True):
            weights[owner] += _size(linear)
    count = plan.recipe.calibration.samples
    return [
        Share(r, len(rank.rows(count, batch)), None, weights[r]) for r, rank in enumerate(ranks)
    ]


def led(plan: Plan) -> list[str]:
    """Names of the passes that the leading rank learns while the others wait."""
    learning = [
        (p.step.name, p.step.params)
        for p in plan.passes
        if isinstance(p.step.params, ModelPass) and type(p.step.params).learn is not ModelPass.learn
    ]
    return [name for name, params in learning if not params.divides(one_host=True)]


def output_bytes(unit: UnitPlan) -> float:
    """By which units are divided through which no rows run."""
    return float(sum(tensor.nbytes for tensor in unit.outputs.values()))


def _coded(plan: Plan, unit: UnitPlan) -> list[Linear]:
    """Linears that get codes."""
    return [x for x in unit.layout.linears if plan.schemes.linears[x.name].weight is not None]


def _size(linear: Linear) -> int:
    return math.prod(linear.shape)


def in_words(found: Sequence[Share], alone: Sequence[str]) -> list[str]:
    """Lines for people."""
    whole = max(sum(share.weights for share in found), 1)
    parts = ", ".join(f"{share.weights / whole:.0%}" for share in found)
    if found[0].units is not None:
        what = f"units {', '.join(str(share.units) for share in found)}"
    else:
        what = f"rows {', '.join(str(share.rows) for share in found)}"
    lines = [f"on {len(found)} ranks: {what}; weights {parts}"]
    if idle := [share.rank for share in found if not share.rows and share.units is None]:
        lines.append(
            f"  {len(idle)} of them have no rows: a smaller batch (--device-memory) or more "
            "calibration.samples would give them some"
        )
    if alone:
        lines.append(f"  rank 0 learns alone, while the others wait: {', '.join(alone)}")
    return lines
