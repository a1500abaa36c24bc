"""What methods learn is stored and read back whole, and decides a policy by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import Field
from torch import Tensor

from compressor.attention.policy import make_policy
from compressor.attention.rules.streaming import streaming_heads
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Problems
from compressor.methods.base import ModelPass, get_pass, pass_names
from compressor.methods.common.learned import Learned
from compressor.methods.duo_attention.method import DuoAttention, Gates
from compressor.methods.streaming.method import Measured, Streaming
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.sensitivity import plans_of_bits


class Everything(Learned):
    one: Tensor
    named: dict[str, Tensor] = Field(default_factory=dict)
    maybe: Tensor | None = None
    count: int
    table: dict[str, float] = Field(default_factory=dict)


@pytest.mark.parametrize("named", [{}, {"model.layers.0.q": torch.ones(2)}])
def test_values_are_read_back(named: dict[str, Tensor]) -> None:
    value = Everything(one=torch.arange(3.0), named=named, count=3, table={"full": 1.5})
    tensors = value.tensors()
    assert set(tensors) == {"one", *(f"named.{name}" for name in named)}
    again = Everything.restore({**tensors, "other.x": torch.ones(1)}, {**value.figures(), "y": 2})
    assert torch.equal(again.one, value.one) and again.named.keys() == named.keys()
    assert again.maybe is None and (again.count, again.table) == (3, {"full": 1.5})


def test_what_is_missing_or_another_is_said() -> None:
    value = Everything(one=torch.ones(1), count=3)
    for tensors, figures, wrong in (
        ({}, {"count": 3}, "one"),
        (value.tensors(), {}, "count"),
        (value.tensors(), {"count": "many"}, "count"),
        (value.tensors(), {"count": 3, "one": 5, "table": []}, "table"),
    ):
        with pytest.raises(InputError, match=f"not stored whole: {wrong}"):
            Everything.restore(tensors, figures)


def test_every_method_that_learns_says_what() -> None:
    kinds = [kind for name in pass_names() if issubclass(kind := get_pass(name), ModelPass)]
    assert len(kinds) >= 7
    assert all(issubclass(kind.learned_type(), Learned) for kind in kinds)
    assert DuoAttention.learned_type() is Gates and Streaming.learned_type() is Measured


def test_equal_gates_stay_sorted(tiny_model: Callable[..., Path]) -> None:
    """Full heads come first in the weights; the policy that is derived from stored gates agrees,
    whichever of equal gates stay full."""
    layout = open_source(tiny_model("llama")).layout
    method = DuoAttention(sinks=1, window=4, share=0.5, reorder=True)
    gates = torch.full((2, 2), 0.5)
    found = method._result(gates, torch.ones(3, 2), {}).value
    again = Gates.restore(found.tensors(), found.figures())
    policy = method.policy(layout, again)
    assert policy is not None and make_policy(policy.to_json()) == policy
    for streaming in streaming_heads(policy).tolist():
        assert streaming == sorted(streaming)
    for wrong in (torch.ones(2), torch.ones(2, 3), torch.ones(())):
        with pytest.raises(InputError, match="gates have shape"):
            method.policy(layout, Gates(gates=wrong, order=found.order))


def test_measured_sinks_are_read_back(tiny_model: Callable[..., Path]) -> None:
    layout = open_source(tiny_model("llama")).layout
    method = Streaming(sinks="measured", window=16, candidates=(0, 4), tolerance=0.0)
    value = Measured(perplexity={"full": 9.0, "0": 11.0, "4": 10.0})
    policy = method.policy(layout, value)
    again = Measured.restore({}, policy.made_by["streaming"])
    assert again == value and method.policy(layout, again) == policy
    assert {rule.sinks for layer in policy.layers for rule in layer.rules} == {4}
    with pytest.raises(InputError, match="what was measured"):
        method.policy(layout, Measured(perplexity={"0": 11.0}))


def test_sensitivity_is_not_measured_after_what_learns(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    passes = [{"duo_attention": {"reorder": True, "data": {"max_length": 200, "min_length": 180}}}]
    recipe = {"model": str(model), "output": "o", "passes": [*passes, {"rtn": {"group_size": 32}}]}
    with pytest.raises(InputError, match="duo_attention changes weights by what it learns"):
        plans_of_bits(recipe, open_source(model), [4])


@pytest.mark.parametrize("name", ["duo_attention", "retrieval_heads", "streaming"])
def test_heads_that_a_policy_cannot_describe_are_refused_in_plan(
    name: str, tiny_model: Callable[..., Path]
) -> None:
    """Before anything is learned: blocks of linear attention have no heads, and of two methods
    that decide which heads stream one is too many."""

    def problems(model: str, *passes: object) -> str:
        recipe = {"model": "m", "output": "o", "passes": list(passes), "format": "dense"}
        with pytest.raises(Problems) as refused:
            make_plan(make_recipe(recipe), open_source(tiny_model(model)))
        return " ".join(problem.message for problem in refused.value.problems)

    needles = {"max_length": 200, "min_length": 180}
    known: dict[str, dict[str, object]] = {
        "duo_attention": {"data": needles},
        "retrieval_heads": {"data": needles, "share": 0.5},
        "streaming": {"sinks": 1, "window": 9},
    }
    given = {name: known[name]}
    assert f"{name}: blocks of this model differ in their heads" in problems("qwen3_next", given)
    other = "streaming" if name != "streaming" else "retrieval_heads"
    assert "two passes both decide `streaming`" in problems("llama", given, {other: known[other]})
