"""The gate: every limit can hold and be missed, and what it suggests is a recipe that plans."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from compressor.checkpoint.source import open_source
from compressor.evaluate.gate import LIMITS, Gate, GateCheck, GateResult, rank_layers
from compressor.evaluate.passkey import PasskeyResult
from compressor.evaluate.perplexity import Estimate, EvaluationResult
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe

MEASURED = EvaluationResult(
    windows=4,
    length=64,
    tokens=252,
    nll=Estimate(2.0, 0.1),
    perplexity=Estimate(7.39, 0.7),
    perplexity_ratio=Estimate(1.02, 0.004),
    kl=Estimate(0.03, 0.002),
    top1=Estimate(0.9, 0.01),
)
PASSKEY = PasskeyResult(cells=(), accuracy=Estimate(0.8, 0.1), exact=Estimate(0.5, 0.1))
ROWS = [
    {"pass": "rtn", "linear": "model.layers.0.self_attn.q_proj", "error": 0.5},
    {"pass": "rtn", "linear": "model.layers.0.mlp.up_proj", "error": 0.01},
    {"pass": "rtn", "linear": "model.layers.1.mlp.down_proj", "error": 0.02},
]


def failures(result: GateResult) -> list[GateCheck]:
    """The limits that were missed."""
    return [check for check in result.checks if not check.passed]


@pytest.mark.parametrize(
    ("name", "holds", "misses"),
    [
        ("ppl", 7.39, 7.38),
        ("ppl_ratio", 1.02, 1.019),
        ("kl", 0.03, 0.029),
        ("top1", 0.9, 0.91),
        ("passkey", 0.8, 0.81),
        ("layer_error", 0.5, 0.49),
        ("tasks", {"arc_easy": 0.4}, {"arc_easy": 0.41}),
    ],
)
def test_a_limit_holds_up_to_itself(name: str, holds: Any, misses: Any) -> None:
    measured = {"passkey": PASSKEY, "tasks": {"arc_easy": Estimate(0.4, 0.02)}}
    assert Gate(**{name: holds}).check(MEASURED, ROWS, **measured).passed
    missed = Gate(**{name: misses}).check(MEASURED, ROWS, **measured)
    (failure,) = failures(missed)
    assert not missed.passed and failure.name.split(".")[0] == name
    assert "the gate asks for" in failure.message
    json.dumps(missed.to_json(), allow_nan=False)


def test_every_limit_is_tried_above() -> None:
    assert set(Gate.model_fields) == {*LIMITS, "tasks"}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_no_number_or_was_not_measured_fails(value: float | None) -> None:
    found = None if value is None else Estimate(value, 0.0)
    for gate in (Gate(kl=10.0), Gate(top1=0.0)):
        result = gate.check(replace(MEASURED, kl=found, top1=found))
        assert not result.passed and failures(result)[0].value is None


def test_a_gate_that_can_never_be_judged_is_known_before_the_run() -> None:
    gate = Gate(ppl=9, kl=0.1, passkey=0.5, tasks={"piqa": 0.5})
    assert gate.unmeasured(against_original=False, passkey=False) == ["kl", "passkey", "tasks.piqa"]
    assert gate.unmeasured(against_original=True, passkey=True, tasks=["piqa"]) == []


@pytest.mark.parametrize("wrong", [{}, {"kl": -1}, {"top1": 2}, {"ppl": math.nan}, {"pll": 1}])
def test_gates_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Gate(**wrong)


def test_layers_are_ranked_and_their_shares_sum_to_one() -> None:
    ranked = rank_layers([*ROWS, {"site": "attn.in", "scale": 1.0}])
    assert [round(layer.error, 2) for layer in ranked] == [0.5, 0.02, 0.01]
    assert sum(layer.share for layer in ranked) == pytest.approx(1)
    broken = rank_layers([*ROWS, {"linear": "x", "error": math.nan}])
    assert broken[0].linear == "x", "what is not a number is worst"
    result = Gate(layer_error=1.0).check(MEASURED, [{"linear": "x", "error": math.nan}])
    assert not result.passed
    json.dumps(result.to_json(), allow_nan=False)


def test_the_suggestion_is_a_recipe_that_plans(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("llama"))
    passes = [{"rtn": {"bits": 4, "group_size": 32, "ignore": ["lm_head"]}}]
    result = Gate(kl=1e-6).check(MEASURED, ROWS, passes=passes, layout=source.layout)
    suggested = yaml.safe_load(result.suggestion)["passes"]
    attention = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    assert suggested[0]["rtn"]["ignore"] == ["lm_head", *attention], "fused ones stay together"
    assert suggested[1] == {"rtn": {"targets": attention, "bits": 8, "group_size": 32}}
    recipe = make_recipe({"model": "m", "output": "o", "passes": suggested})
    plan = make_plan(recipe, source)
    bits = {name: s.weight.bits for name, s in plan.schemes.linears.items() if s.weight}
    assert [bits[name] for name in attention] == [8, 8, 8]
    assert bits["model.layers.0.mlp.up_proj"] == 4
    assert passes == [{"rtn": {"bits": 4, "group_size": 32, "ignore": ["lm_head"]}}]


def test_what_does_not_plan_is_not_suggested() -> None:
    """Eight bits, else left alone, else finer groups for all, else nothing."""
    passes = [{"rtn": {"bits": 4, "group_size": 32}}]

    def suggested(plans: Callable[[Any], bool]) -> Any:
        found = Gate(kl=1e-6).check(MEASURED, ROWS, passes=passes, plans=plans).suggestion
        return yaml.safe_load(found)["passes"] if found else None

    worst = "model.layers.0.self_attn.q_proj"
    alone = [{"rtn": {"bits": 4, "group_size": 32, "ignore": ["lm_head", worst]}}]
    eight = {"rtn": {"targets": [worst], "bits": 8, "group_size": 32}}
    assert suggested(lambda found: True) == [*alone, eight]
    assert suggested(lambda found: len(found) == 1) == alone
    assert suggested(lambda found: "ignore" not in found[0]["rtn"]) == [
        {"rtn": {"bits": 4, "group_size": 16}}
    ]
    assert suggested(lambda found: False) is None


def test_eight_bits_are_left_alone_and_nothing_is_suggested_without_passes() -> None:
    result = Gate(kl=1e-6).check(MEASURED, ROWS, passes=[{"rtn": {"bits": 8}}])
    assert yaml.safe_load(result.suggestion)["passes"] == [
        {"rtn": {"bits": 8, "ignore": ["lm_head", "model.layers.0.self_attn.q_proj"]}}
    ]
    assert Gate(kl=1e-6).check(MEASURED, ROWS).suggestion == ""
    assert Gate(kl=1.0).check(MEASURED, ROWS, passes=[{"rtn": {}}]).suggestion == ""
