"""Headers of a mixture of hundreds of experts, without a weight behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.find import locate
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.runtimes import loads
from tests.support.scripts import load

EXPERTS = 128


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose shards are holes."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    models = load("scripts/make_random_model.py")
    config = models.smaller(models.SHAPES["qwen3-235b-a22b"]) | {"num_experts": EXPERTS}
    models.write_sparse(folder, config, layers=2)
    return folder


def test_what_experts_have_in_common_is_asked_once(
    headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    linear = loads._linear

    def counted(runtime: Any, written: Any, one: Any, *rest: Any, **more: Any) -> Any:
        asked.append(one.name)
        return linear(runtime, written, one, *rest, **more)

    monkeypatch.setattr(loads, "_linear", counted)
    passes = [{"rtn": {"bits": 4, "group_size": 32, "symmetric": True}}]
    recipe = {"model": str(headers), "output": str(tmp_path / "out"), "passes": passes}
    source = locate(str(headers), fetch=False, to_plan=True).source
    plan = make_plan(make_recipe(recipe), source, output=tmp_path / "out")
    assert len(plan.passes[0].names) == 2 * (4 + 3 * EXPERTS)
    roles = {x.role for x in plan.layout.linears}
    assert 0 < len(asked) <= 2 * len(roles)
