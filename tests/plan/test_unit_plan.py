"""What a run does in one unit: which passes, what is observed when, what is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.plan import plan as plan_module
from compressor.plan.plan import Plan, make_plan
from compressor.plan.recipe import make_recipe

RTN = {"rtn": {"bits": 4, "group_size": 32}}


@pytest.fixture
def plan(tiny_model: Callable[..., Path]) -> Callable[..., Plan]:
    def make(*passes: Any, **top: Any) -> Plan:
        data = {"model": "m", "output": "o", "passes": list(passes), **top}
        return make_plan(make_recipe(data), open_source(tiny_model("llama")))

    return make


def test_a_unit_has_the_passes_that_select_something_in_it(plan: Callable[..., Plan]) -> None:
    head = {"fp8": {"targets": "lm_head", "ignore": []}}
    made = plan({"rtn": {**RTN["rtn"], "targets": "layers.1.*"}}, head)
    assert [unit.steps for unit in made.units] == [(), (), (0,), (1,)]
    assert not any(unit.calibrated for unit in made.units)


def test_a_pass_that_works_on_all_is_everywhere(plan: Callable[..., Plan]) -> None:
    made = plan("rotate", RTN, untie=True)
    assert [unit.steps for unit in made.units] == [(0,), (0, 1), (0, 1), (0,)]


def test_statistics_are_read_of_the_inputs_of_what_is_selected(plan: Callable[..., Plan]) -> None:
    made = plan({"gptq": {"group_size": 32, "targets": ["attn.o", "mlp.down"]}})
    embedding, block, *_ = made.units
    down = next(x for x in block.layout.linears if x.role == "mlp.down")
    assert set(block.needs) == {"attn.out", down.site}
    assert all(need.gram for need in block.needs.values())
    assert block.calibrated and not embedding.calibrated


def test_what_is_stale_is_observed_anew_and_all_else_at_once(plan: Callable[..., Plan]) -> None:
    """A transform changes what follows it sees; rounding from data does not."""
    plain = {"group_size": 32, "correction": 0.0}
    block = plan("awq", {"gptq": plain}).units[1]
    awq, gptq = block.seen
    assert awq.sites["attn.in"].absmean and not gptq.sites["attn.in"].absmean
    assert gptq.sites["attn.in"].gram
    both = plan(
        {"gptq": {**plain, "targets": "attn.o"}},
        {"gptq": {**plain, "targets": "mlp.down"}},
    )
    first, second = both.units[1].seen
    # Seen in one run of the tokens, and again only by a run that begins in between.
    assert set(second.sites) < set(first.sites)


def test_what_is_seen_beside_the_original_is_not_observed_before(
    plan: Callable[..., Plan],
) -> None:
    gptq = {"gptq": {"group_size": 32}}
    block, head = (plan("awq", gptq).units[i] for i in (1, 3))
    assert not block.seen[1].sites and block.needs["attn.in"].cross and block.calibrated
    assert plan(gptq, propagate="original").units[1].seen[0].sites["attn.in"].gram
    assert not head.steps


def test_keys_and_values_are_observed_where_there_is_attention(plan: Callable[..., Plan]) -> None:
    made = plan("kv_cache", RTN)
    observed = [[wanted.kv is not None for wanted in unit.seen] for unit in made.units]
    assert observed[1] == observed[2] and observed[1][0]
    assert not any(any(unit) for unit in (observed[0], observed[3]))


def test_outputs_are_those_of_the_format(plan: Callable[..., Plan]) -> None:
    unit = plan({"rtn": {**RTN["rtn"], "targets": "attn.o"}}).units[1]
    names = {name.rpartition("o_proj.")[2] for name in unit.outputs if "o_proj" in name}
    assert names == {"weight_packed", "weight_scale", "weight_shape"}
    others = [name for name in unit.outputs if "o_proj" not in name]
    assert len(others) == 8 and all(name.endswith(".weight") for name in others)


def test_a_cpu_multiplies_bfloat16_where_passes_read_sums_over_inputs_alone(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, source = torch.device("cpu"), {}
    for dtype in (torch.bfloat16, torch.float32):
        source[dtype] = open_source(tiny_models.build("llama", tmp_path / str(dtype), dtype=dtype))

    def does(step: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[bool]:
        recipe = make_recipe({"model": "m", "output": "o", "passes": [step]})
        made, found = make_plan(recipe, source[dtype]), []
        for quick in (False, True):
            monkeypatch.setattr(plan_module, "multiplies_bfloat16", lambda quick=quick: quick)
            found.append(made.multiplies_bfloat16(cpu))
            assert not made.multiplies_bfloat16(torch.device("cuda"))
        return found

    awq = {"bits": 4, "group_size": 32}
    assert does({"awq": awq}) == [False, True]
    assert does({"awq": awq}, torch.float32) == [False, False]
    assert does({"awq": {**awq, "search": "reference"}}) == [False, False]
    assert does({"gptq": {"group_size": 32, "correction": 0.5}}) == [False, False]
