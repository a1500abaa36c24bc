"""What a plan says of ranks is what a run gives them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError
from compressor.plan.plan import Plan, make_plan
from compressor.plan.recipe import make_recipe
from compressor.plan.shares import in_words, led, shares

AWQ = {"awq": {"bits": 4, "group_size": 32}}
FLOAT = ("lm_head", "router")
"""Roles that quantizers leave alone."""


def planned(model: Path, *passes: dict[str, Any]) -> Plan:
    recipe = {"model": str(model), "output": "out", "passes": [*passes]}
    recipe["calibration"] = {"samples": 7, "length": 32}
    return make_plan(make_recipe(recipe), open_source(model))


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_rows_and_weights_are_dealt_out_whole(world: int, tiny_model: Callable[..., Path]) -> None:
    plan = planned(tiny_model("mixtral"), AWQ)
    found = shares(plan, world, 2)
    assert [share.rows for share in found][:4] == {
        1: [7],
        2: [4, 3],
        3: [3, 2, 2],
        9: [2, 2, 2, 1],
    }[world]
    coded = [x for unit in plan.layout.units for x in unit.linears if x.role not in FLOAT]
    weights, sizes = [s.weights for s in found], [x.shape[0] * x.shape[1] for x in coded]
    assert sum(weights) == sum(sizes)
    # No rank has more than its even share and one linear of each block.
    most = sum(sizes) / world + max(sizes) * len(plan.layout.blocks)
    assert max(weights) <= most
    assert ("have no rows" in "".join(in_words(found, []))) is (world == 9)


def test_units_without_data_are_dealt_out_whole(tiny_model: Callable[..., Path]) -> None:
    plan = planned(tiny_model("llama"), {"rtn": {"bits": 4, "group_size": 32}})
    found = shares(plan, 3, 2)
    assert sum(share.units or 0 for share in found) == len(plan.units)
    assert all(share.rows == 0 for share in found)


def test_what_one_rank_learns_alone_is_named(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    emulator = {"emulator": {"pads": [1, 0], "keep": 1, "distill": {}}}
    heads = {"retrieval_heads": {"data": {"min_length": 200, "max_length": 200}}}
    assert led(planned(model, heads, AWQ)) == ["retrieval_heads"]
    assert led(planned(model, emulator)) == []


def test_plan_says_it(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    text = "\n".join(f"Line {i} by the river." for i in range(200))
    (tmp_path / "t.txt").write_text(text)
    data = {"data": str(tmp_path / "t.txt"), "samples": 4, "length": 16}
    made = {"model": str(tiny_model("llama")), "output": str(tmp_path / "o"), "passes": [AWQ]}
    recipe.write_text(json.dumps({**made, "calibration": data}))
    told = CliRunner().invoke(cli, ["plan", str(recipe), "--gpus", "2", "--device", "cpu"])
    assert told.exit_code == 0 and "on 2 ranks: rows 4, 0; weights " in told.output
    wrong = CliRunner().invoke(cli, ["plan", str(recipe), "--gpus", "none"])
    assert isinstance(wrong.exception, InputError)
