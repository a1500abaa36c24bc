"""Headers of a mixture of hundreds of experts, without a weight behind them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.find import locate
from compressor.plan.plan import Plan, make_plan
from compressor.plan.recipe import make_recipe
from compressor.plan.verify_memory import verifying_bytes
from compressor.runner import expert_groups
from compressor.runtimes import loads
from tests.support.scripts import load

EXPERTS = 128


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose shards are holes."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    models = load("scripts/make_random_model.py")
    config = models.smaller(models.SHAPES["qwen3-235b-a22b"]) | {"num_experts": EXPERTS}
    models.write(folder, config, layers=2, sparse=True)
    return folder


def planned(headers: Path, folder: Path) -> Plan:
    passes = [{"rtn": {"bits": 4, "group_size": 32, "symmetric": True}}]
    recipe = {"model": str(headers), "output": str(folder / "out"), "passes": passes}
    source = locate(str(headers), fetch=False, to_plan=True).source
    return make_plan(make_recipe(recipe), source, output=folder / "out")


def test_what_experts_have_in_common_is_asked_once(
    headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    linear = loads._linear

    def counted(runtime: Any, written: Any, one: Any, *rest: Any, **more: Any) -> Any:
        asked.append(one.name)
        return linear(runtime, written, one, *rest, **more)

    monkeypatch.setattr(loads, "_linear", counted)
    plan = planned(headers, tmp_path)
    assert len(plan.passes[0].names) == 2 * (4 + 3 * EXPERTS)
    roles = {x.role for x in plan.layout.linears}
    assert 0 < len(asked) <= 2 * len(roles)


def test_verify_takes_both_checkpoints_and_a_group_of_experts_in_float32(
    headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cpu = planned(headers, tmp_path), torch.device("cpu")
    (unit, *_) = plan.layout.blocks
    weights = sum(x.out_features * x.in_features for x in unit.linears if x.expert is not None)
    beside, _ = verifying_bytes(plan, cpu)
    monkeypatch.setattr(expert_groups, "WEIGHTS", weights // EXPERTS)
    apart, _ = verifying_bytes(plan, cpu)
    assert beside - apart == 4 * (weights - weights // EXPERTS)
    stored = sum(plan.source.checkpoint.entries[n].spec.nbytes for n in unit.tensors)
    written = sum(spec.nbytes for spec in plan.target.shapes(unit).values())
    assert stored + written < apart < stored + written + weights
