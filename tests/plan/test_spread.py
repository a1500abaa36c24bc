"""Experts that one rank has no room for: which blocks are spread, and what a rank takes then."""

import math
import operator
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.find import locate
from compressor.ir.same_shape import groups_of_experts, homes, of_one_shape
from compressor.plan.estimate import Estimates, estimate
from compressor.plan.plan import Plan, make_plan
from compressor.plan.recipe import make_recipe
from compressor.plan.shares import shares
from compressor.plan.spread import spread_units, working_bytes
from compressor.plan.unit_plan import UnitPlan
from compressor.runner import experts
from tests.support.scripts import load

AWQ = {"bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 128 experts whose shards are holes."""
    folder = tmp_path_factory.mktemp("spread") / "model"
    models = load("scripts/make_random_model.py")
    config = models.smaller(models.SHAPES["30b-a3b"]) | {"num_experts": 128}
    models.write(folder, config, layers=2, sparse=True)
    return folder


def planned(headers: Path, name: str = "awq", **params: Any) -> Plan:
    recipe = {
        **{"model": str(headers), "output": str(headers.parent / "out"), "verify": False},
        "calibration": {"samples": 2, "length": 32},
        "passes": [{name: params}],
    }
    source = locate(str(headers), fetch=False, to_plan=True).source
    return make_plan(make_recipe(recipe), source, output=headers.parent / "out")


def takes(plan: Plan, world: int, memory: int | None = None) -> Estimates:
    cuda = torch.device("cuda")
    return estimate(plan, device=cuda, resident=0, device_memory=memory, world=world)


def least(plan: Plan) -> int:
    """Of a GPU's memory with which a block is whole on one rank, with no other beside it."""
    return takes(plan, 1, takes(plan, 1).device_bytes - 1).device_bytes


def test_no_stack_lies_at_two_ranks(headers: Path) -> None:
    linears = planned(headers, **AWQ).units[1].layout.linears
    groups = groups_of_experts(linears)
    experts = sorted({x.expert for x in linears if x.expert is not None})
    assert len(groups) > 1 and [e for group in groups for e in group] == experts
    for world in range(2, len(groups) + 1):
        home = homes(linears, world)
        assert list(home) == experts and set(home.values()) == set(range(world))
        for stack in of_one_shape(linears, lambda x: x.role):
            assert len({home.get(x.expert, -1) for x in stack}) == 1
    assert homes(linears, len(groups) + 1) == homes(linears, 1) == {}


def test_a_rank_without_room_for_a_block_takes_its_share_of_experts(headers: Path) -> None:
    plan = planned(headers, **AWQ)
    whole = least(plan)
    assert takes(plan, 4, whole).alone == 0
    spread = takes(plan, 4, whole - 1)
    assert spread.alone == whole and not spread.experts_apart
    assert spread.device_bytes < whole
    # Where its share does not fit either, experts wait in main memory, as they do of one alone.
    for world in (1, 4):
        found = takes(plan, world, 1)
        assert found.experts_apart and found.alone == 0


def test_a_rank_packs_no_other_s_experts(headers: Path) -> None:
    def packed(unit: UnitPlan) -> int:
        return sum(spec.nbytes for name, spec in unit.outputs.items() if ".experts." in name)

    plan = planned(headers, **AWQ)
    share, whole = working_bytes(plan, packed, room=0, world=4)
    assert 0 < 4 * share == whole


def test_weights_of_a_rank_are_those_of_its_experts(headers: Path) -> None:
    plan = planned(headers, **AWQ)
    of_experts = [0, 0, 0]
    for unit in plan.units:
        home = homes(unit.layout.linears, 3)
        for linear in unit.layout.linears:
            if linear.expert is not None:
                of_experts[home[linear.expert]] += math.prod(linear.shape)
    found = [share.weights for share in shares(plan, 3, 2, spread=True)]
    assert all(map(operator.ge, found, of_experts))
    even = [share.weights for share in shares(plan, 3, 2)]
    assert sum(even) == sum(found) and max(even) < max(found)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("awq", {**AWQ, "search": "reference"}),
        ("awq", {**AWQ, "duo": True}),
        ("gptq", AWQ),
        ("rtn", AWQ),
    ],
)
def test_what_wants_all_of_a_block_in_one_place_is_not_spread(
    headers: Path, name: str, params: dict[str, Any]
) -> None:
    assert spread_units(planned(headers, **AWQ), 4) == {1, 2}
    assert spread_units(planned(headers, name, **params), 4) == frozenset()


def test_experts_that_transformers_runs_otherwise_are_not_spread(
    headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a run would only find out once it loads the first of them."""
    plan = planned(headers, **AWQ)
    assert takes(plan, 4, least(plan) - 1).alone
    monkeypatch.setattr(experts, "divisible", lambda module: False)
    assert spread_units(plan, 4) == frozenset()
    assert not takes(plan, 4, least(plan) - 1).alone
