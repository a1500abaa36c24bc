"""Bits are spent where they help most, never more than allowed."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import InputError
from compressor.plan.recipe import make_recipe
from compressor.run.allocate import (
    Group,
    Option,
    Sensitivity,
    allocate,
    error_of,
    frontier,
    mixed_recipe,
    parse_sensitivity,
    split_bits,
    uniform,
)
from compressor.run.roofline import Gpu, gpu_of, seconds, timed

RECIPE = {
    "model": "m",
    "output": "out",
    "calibration": {"samples": 4},
    "passes": [{"awq": {"bits": 4, "group_size": 64}}],
}


def sensitivity(groups):
    return Sensitivity(recipe=RECIPE, measure="", tokens=1, groups=groups)


def group(number, weights, options):
    return Group(
        linears=(f"layers.{number}",),
        weights=weights,
        options=tuple(Option(bits=round(b), bits_per_weight=b, error=e) for b, e in options),
    )


OPTIONS = st.lists(
    st.tuples(st.sampled_from([2.0, 3.0, 4.0, 6.0, 8.0]), st.floats(0, 1)),
    min_size=1,
    max_size=4,
    unique_by=lambda option: option[0],
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), OPTIONS), min_size=1, max_size=4),
    st.floats(1.5, 9),
)
def test_the_choice_fits_and_is_near_the_best(shapes, target):
    found = sensitivity([group(i, n, options) for i, (n, options) in enumerate(shapes)])
    every = list(itertools.product(*(range(len(g.options)) for g in found.groups)))
    fitting = [c for c in every if found.bits_per_weight(c) <= target + 1e-9]

    def error(choice):
        return sum(g.options[i].error for g, i in zip(found.groups, choice, strict=True))

    if not fitting:
        with pytest.raises(InputError, match="fewer than the smallest"):
            allocate(found, target)
        return
    choice = allocate(found, target)
    assert found.bits_per_weight(choice) <= target + 1e-6
    best = min(map(error, fitting))
    # A relaxed optimum is one hull step of one group away.
    step = max(
        max(o.error for o in g.options) - min(o.error for o in g.options) for g in found.groups
    )
    assert error(choice) <= best + step + 1e-9
    for number, g in enumerate(found.groups):
        for other in range(len(g.options)):
            changed = [*choice[:number], other, *choice[number + 1 :]]
            if found.bits_per_weight(changed) <= target - 1e-6:
                assert error(changed) >= error(choice) - 1e-12


def test_sensitive_layers_get_the_bits():
    hard = [(3, 0.9), (4, 0.2), (8, 0.001)]
    easy = [(3, 0.01), (4, 0.003), (8, 0.0001)]
    found = sensitivity([group(0, 10, easy), group(1, 10, hard), group(2, 10, easy)])
    assert allocate(found, 3) == [0, 0, 0]
    assert allocate(found, 14 / 3) == [0, 2, 0]
    assert allocate(found, 8) == [2, 2, 2]


def test_the_recipe_names_every_group_once():
    left = Group(
        linears=("a", "b"),
        weights=4,
        options=(
            Option(bits=4, bits_per_weight=4.25, error=0.1),
            Option(bits=None, bits_per_weight=16, error=0),
        ),
    )
    right = left.model_copy(update={"linears": ("c",)})
    made = mixed_recipe(sensitivity([left, right]), [0, 1])
    recipe = make_recipe(made)
    assert [step.name for step in recipe.passes] == ["awq", "rtn"]
    for step in recipe.passes:
        assert step.params.targets == "linear" and step.params.ignore == ["lm_head", "c"]
    assert recipe.passes[1].params.group_size == 64
    assert recipe.calibration.samples == 4
    assert len(make_recipe(mixed_recipe(sensitivity([left, left]), [0, 0])).passes) == 2
    with pytest.raises(InputError, match="nothing"):
        mixed_recipe(sensitivity([left, right]), [1, 1])


def test_unusual_bits_have_names():
    hard, easy = (
        group(i, 10, [(4, error), (8, error / 100)]) for i, error in ((0, 0.9), (1, 0.01))
    )
    made = mixed_recipe(
        sensitivity([easy, hard, easy.model_copy(update={"linears": ("x",)})]), [0, 1, 0]
    )
    awq, usual, other = make_recipe(made).passes
    assert awq.params.ignore == ["lm_head"]
    assert usual.params.bits == 4 and usual.params.ignore == ["lm_head", "layers.0"]
    assert other.params.bits == 8 and other.params.targets == ["layers.0"]
    assert other.params.group_size == 64


def test_group_sizes_are_chosen_too():
    wide, narrow = (
        Option(bits=3, group_size=size, bits_per_weight=3 + 16 / size, error=error)
        for size, error in ((64, 0.2), (32, 0.1))
    )
    more = Option(bits=4, group_size=64, bits_per_weight=4.25, error=0.02)
    groups = [Group(linears=(n,), weights=4, options=(wide, narrow, more)) for n in "abc"]
    passes = make_recipe(mixed_recipe(sensitivity(groups), [0, 2, 0])).passes
    grids = [(step.params.bits, step.params.group_size) for step in passes[1:]]
    assert grids == [(3, 64), (4, 64)] and passes[2].params.targets == ["b"]
    assert uniform(sensitivity(groups))["3 bits in groups of 32"] == pytest.approx((3.5, 0.3))


def test_which_pass_has_bits_to_choose():
    before, quantizer = split_bits([{"smoothquant": {"alpha": 0.5}}, {"rtn": {"bits": 8}}])
    assert before == [{"smoothquant": {"alpha": 0.5}}] and quantizer == {"rtn": {"bits": 8}}
    with pytest.raises(InputError, match="no `bits`"):
        split_bits([{"fp8": {}}])
    with pytest.raises(InputError, match="0 quantizers"):
        split_bits([{"smoothquant": {}}])
    with pytest.raises(InputError, match="2 quantizers"):
        split_bits([{"rtn": {"targets": "mlp.*"}}, {"rtn": {"targets": "attn.*"}}])


def test_a_budget_of_time_spends_no_bits_on_what_multiplying_hides():
    shapes = [(3.0, 0.9), (4.0, 0.2), (8.0, 0.001)]
    found = sensitivity([group(i, 10, shapes) for i in range(2)])
    chip = Gpu(bandwidth=1.0, operations=16.0)
    assert timed(found, chip, 1) == found
    slow = timed(found, chip, 4)  # reading four bits takes as long as multiplying
    assert [o.bits_per_weight for o in slow.groups[0].options] == [4, 4, 8]
    assert allocate(slow, 4) == [1, 1]
    assert seconds(3.0, 20, chip, 4) == seconds(4.0, 20, chip, 4) == 10.0
    with pytest.raises(InputError, match="no figures"):
        gpu_of("abacus")


def test_the_frontier_falls_and_lies_under_what_is_uniform():
    hard, easy = [(3.0, 0.9), (4.0, 0.2), (8.0, 0.01)], [(3.0, 0.01), (4.0, 0.005), (8.0, 0.001)]
    found = sensitivity([group(i, 10, hard if i % 2 else easy) for i in range(6)])
    points = frontier(found)
    assert points == sorted(points) and [e for _, e in points] == sorted(
        (e for _, e in points), reverse=True
    )
    bits, error = uniform(found)["4 bits"]
    assert min(e for b, e in points if b <= bits) <= error
    assert error_of(found, [0] * 6) == uniform(found)["3 bits"][1]


def test_files():
    found = sensitivity([group(0, 10, [(3.0, 0.1)])])
    assert parse_sensitivity(found.model_dump_json(), where="x") == found
    for bad in ("", "{}", '{"groups": []}', "[1"):
        with pytest.raises(InputError, match="x holds no"):
            parse_sensitivity(bad, where="x")


@pytest.mark.parametrize(("unit", "each"), [("bits per weight", 1.0), ("megabytes", 3.7e-4)])
def test_the_least_budget_is_said_in_the_user_s_unit_and_suffices(unit, each):
    found = sensitivity((group(0, 7, [(3.50625, 0.1), (4.5, 0.0)]),))
    with pytest.raises(InputError, match=unit) as refused:
        allocate(found, 3.5, unit=unit, each=each)
    least = float(str(refused.value.hint).removeprefix("at least ").partition(";")[0])
    assert least == pytest.approx(3.50625 * each, rel=1e-3)
    assert allocate(found, least / each, unit=unit, each=each) == [0]
