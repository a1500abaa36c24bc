"""progressive on one block, its range search, and what qoq stands for."""

import pytest
import torch
from compressor_calibration.stats import StatNeeds
from pydantic import ValidationError

from compressor.errors import Problems
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import ActivationSpec
from compressor.methods.progressive import Progressive
from compressor.methods.qoq import Qoq
from compressor.numerics import quantize
from compressor.numerics.gptq import row_errors
from compressor.numerics.range_search import search_ranges
from compressor.plan.recipe import make_recipe
from tests.support.block_bench import BlockBench

CHANNEL = QuantSpec("int", 4, "channel", zero="offset", scale_dtype=torch.float16)
GROUPS = QuantSpec("int", 4, "group", 16, zero="offset", scale_dtype=torch.int8, second="channel")


def heavy(rows=40, columns=64, seed=0):
    """A weight with outliers worth cutting off, and a Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 5] *= 4
    x = torch.randn(200, columns, generator=generator)
    x[:, 5] *= 0.05
    return weight, x.T @ x


@pytest.mark.parametrize("spec", [CHANNEL, GROUPS, QuantSpec("int", 3, "group", 32)])
def test_shrunk_ranges_lose_less_in_every_row(spec):
    weight, gram = heavy()
    ranges = search_ranges(weight, gram, spec, steps=20)
    plain = quantize(weight, spec).dequantize() - weight
    ours = quantize(weight, spec, **ranges).dequantize() - weight
    before, after = row_errors(plain, gram), row_errors(ours, gram)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()
    low, high = ranges["clip_min"], ranges["clip_max"]
    groups = weight.view(40, low.shape[1], -1)
    ratio = high / groups.amax(-1)
    assert torch.allclose(ratio, low / groups.amin(-1), rtol=1e-5)
    assert ratio.min() >= 0.2 and ratio.max() <= 1 and (ratio < 1).any()


def test_a_range_that_is_right_stays():
    """Two values per group need no shrinking: both lie on the grid."""
    weight = torch.tensor([-1.0, 1.0]).repeat(8, 16)
    ranges = search_ranges(weight, torch.eye(32), QuantSpec("int", 4, "group", 8, zero="subtract"))
    made = quantize(weight, QuantSpec("int", 4, "group", 8, zero="subtract"), **ranges)
    assert torch.allclose(made.dequantize(), weight, atol=0.08)
    assert ranges["clip_max"].min() > 0.9


@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 16},
        {"group_size": 32, "zero": "subtract"},
        {"group_size": None, "clip_steps": 16},
    ],
)
def test_each_step_of_the_quantizer_helps(model_type, options, tiny_model):
    b = BlockBench(tiny_model(model_type))
    step = Progressive(**options, min_tokens=16)
    plain = step.model_copy(update={"gptq": False, "clip": False})
    clipped = step.model_copy(update={"gptq": False, "clip": True, "clip_steps": 16})
    results = [b.run(x) for x in (plain, clipped, step)]
    errors = [b.error(x) for x in results]
    assert errors[2] < errors[0] and errors[1] < errors[0] * 1.02, errors
    every = {x.name for x in b.layout.linears if x.role != "router"}
    for result in results:
        assert set(result.unit.quantized) == every == {row["linear"] for row in result.rows}
        for q in result.unit.quantized.values():
            assert q.spec == step.effects().scheme.weight
            if options["group_size"]:
                int8 = (q.dequantize(torch.float64) / q.second.double()).round()
                assert int8.min() >= -128 and int8.max() <= 127
    assert plain.needs().stats == StatNeeds() and step.needs().stats.gram


def test_schemes_are_those_of_qserve():
    assert Progressive().effects().scheme.input == ActivationSpec("int8", "token")
    assert Progressive(group_size=16).effects().scheme.weight == GROUPS
    assert Progressive(group_size=None).effects().scheme.weight == CHANNEL
    assert Progressive(group_size=None).clips and not Progressive().clips
    assert Progressive(clip=True).clips
    for kind in (Progressive, Qoq):
        with pytest.raises(ValidationError, match="needs a group_size"):
            kind(group_size=None, zero="subtract")


def steps(**params):
    recipe = make_recipe({"model": "m", "output": "o", "passes": [{"qoq": params}]})
    return {step.name: step.params for step in recipe.passes}


def test_qoq_stands_for_its_steps():
    found = steps()
    assert list(found) == [
        *("rotate", "reorder", "smoothquant", "smooth_attention", "progressive", "kv_cache")
    ]
    assert found["progressive"].group_size == 128 and found["smoothquant"].alpha == 0.3
    assert found["smoothquant"].targets == "*.down" and found["smoothquant"].fold_up
    channel = steps(group_size=None)
    assert "reorder" not in channel and channel["smoothquant"].alpha == 0.1
    bare = steps(rotate=False, reorder=False, down_alpha=None, attention_alpha=None, kv_cache=False)
    assert list(bare) == ["progressive"]
    chosen = steps(
        down_alpha=0.05, seed=3, keep_mean=True, targets=["mlp.*"], ignore=[], gptq=False
    )
    assert chosen["smoothquant"].alpha == 0.05
    assert chosen["rotate"].seed == 3 and chosen["rotate"].keep_mean
    assert chosen["progressive"].targets == ["mlp.*"] and not chosen["progressive"].gptq
    with pytest.raises(Problems, match="down_alpha is a number from 0 to 1"):
        steps(down_alpha=2.0)


def test_the_written_recipe_is_what_was_run():
    data = {"model": "m", "output": "o", "passes": [{"qoq": {"group_size": 64}}]}
    resolved = make_recipe(data).resolved()
    again = make_recipe({**resolved, "output": "o"})
    assert again.resolved() == resolved
