"""The gptq pass on one block of each family."""

import pytest
import torch
from compressor_calibration.stats import StatNeeds
from pydantic import ValidationError

from compressor.ir.qtensor import NVFP4, spread
from compressor.ir.scheme import ActivationSpec
from compressor.methods.awq.method import Awq
from compressor.methods.gptq import Gptq
from compressor.methods.nvfp4 import Nvfp4
from compressor.methods.rtn import Rtn
from compressor.methods.smoothquant import Smoothquant
from compressor.numerics import nearest_codes, quantize
from tests.support.block_bench import BlockBench
from tests.support.tiny_models import TYPES

AS_PUBLISHED = {"scales": "range", "damping": 0.01, "correction": 0.0}


@pytest.fixture
def bench(tiny_model):
    wanted = StatNeeds(gram=True, absmax=True)
    return lambda kind, **options: BlockBench(tiny_model(kind), wanted=wanted, **options)


@pytest.mark.parametrize("model_type", TYPES)
def test_gptq_beats_rounding_to_nearest(model_type, bench):
    b = bench(model_type)
    grid = {"bits": 3, "group_size": 16, "symmetric": False}
    plain, ours = b.run(Rtn(**grid)), b.run(Gptq(**grid, **AS_PUBLISHED, min_tokens=16))
    every = [x for x in b.layout.linears if x.role != "router"]
    assert set(ours.unit.quantized) == {x.name for x in every}
    assert [row["linear"] for row in ours.rows] == [x.name for x in every]
    for row, other, linear in zip(ours.rows, plain.rows, every, strict=True):
        assert row["rows"] == linear.out_features > row["rows_kept_nearest"] >= 0
        assert row["error"] < row["nearest_error"] == pytest.approx(other["error"], rel=1e-3)
        q, nearest = (r.unit.quantized[linear.name] for r in (ours, plain))
        assert torch.equal(q.scales, nearest.scales) and torch.equal(q.zeros, nearest.zeros)
    assert b.error(ours) < b.error(plain)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral"])
def test_search_descent_and_refits_each_lower_the_error(model_type, symmetric, bench):
    b = bench(model_type)
    grid = {"bits": 3, "group_size": 16, "symmetric": symmetric, "min_tokens": 16}
    settings = ({}, {"scales": "search"}, {"descent": 2}, {"descent": 2, "refits": 2})
    errors = []
    for more in settings:
        grid |= more
        errors.append(sum(r["error"] for r in b.run(Gptq(**grid, damping=0.1)).rows))
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.9 * errors[0]


def test_searched_scales_of_a_channel_beside_int8_inputs_are_narrow(bench):
    b = bench("llama")
    step = Gptq(bits=8, activations="token", scales="search", descent=1, refits=1)
    for q in b.run(step).unit.quantized.values():
        assert (q.scales > 0).all() and (q.codes >= 1).all()


def test_descent_works_on_the_grid_of_nvfp4(bench):
    b = bench("llama")
    plain, ours = (b.run(Gptq(grid="nvfp4", descent=n)) for n in (0, 2))
    assert sum(r["error"] for r in ours.rows) < sum(r["error"] for r in plain.rows)
    for name, q in ours.unit.quantized.items():
        assert torch.equal(q.scales.float(), plain.unit.quantized[name].scales.float())


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_nvfp4_keeps_its_scales(model_type, rule, bench):
    b = bench(model_type)
    plain, ours = (
        b.run(Nvfp4(rule=rule)),
        b.run(Gptq(grid="nvfp4", **AS_PUBLISHED, rule=rule, min_tokens=16)),
    )
    for name, q in ours.unit.quantized.items():
        nearest = plain.unit.quantized[name]
        assert q.spec == NVFP4 and torch.equal(q.second, nearest.second)
        assert torch.equal(q.scales.float(), nearest.scales.float())
    assert b.error(ours) < b.error(plain)


@pytest.mark.parametrize("activations", ["token", "static"])
def test_w8a8_after_smoothquant(activations, bench):
    b = bench("llama")
    step = Gptq(bits=8, group_size=None, activations=activations)
    smoothed = b.run(Smoothquant(alpha=0.5)).unit
    ours = b.run(step, unit=smoothed)
    plain = b.run(Rtn(bits=8, group_size=None, activations=activations), unit=smoothed)
    assert ours.unit.input_scales.keys() == plain.unit.input_scales.keys()
    assert bool(ours.unit.input_scales) == (activations == "static")
    for name, scale in ours.unit.input_scales.items():
        assert torch.equal(scale, plain.unit.input_scales[name])
    for q in ours.unit.quantized.values():
        assert (q.scales > 0).all() and (q.codes >= 1).all(), "codes are -127 … 127"
    assert b.error(ours) < b.error(plain)


def test_awq_then_gptq(bench):
    b = bench("llama")
    step = Gptq(bits=3, group_size=16)
    scaled = b.run(Awq(min_tokens=8), then=step).unit
    assert not scaled.quantized
    assert b.error(b.run(step, unit=scaled)) < b.error(b.run(Rtn(bits=3, group_size=16)))


@pytest.mark.parametrize("scales", ["range", "search"])
def test_experts_that_saw_few_tokens_are_rounded_to_nearest(scales, bench):
    b = bench("mixtral", rows=1, length=24)
    ours = b.run(Gptq(bits=4, group_size=16, min_tokens=12, scales=scales, descent=1, refits=1))
    noted = [row for row in ours.rows if "note" in row]
    experts = {row["linear"].split(".experts.")[1][0] for row in noted}
    assert 0 < len(experts) < 4 and len(noted) == 3 * len(experts)
    for row in noted:
        assert row["note"] == "calibration tokens came here: rounded to nearest"
        assert 0 <= row["noted"] < 12
        assert row["error_of"] == "weight" and "rows_kept_nearest" not in row
        q = ours.unit.quantized[row["linear"]]
        weight = b.unit.tensors[f"{row['linear']}.weight"]
        nearest = quantize(weight, q.spec)
        if scales == "range" or row["linear"].endswith("w2"):
            assert torch.equal(q.codes, nearest.codes)
        else:  # what enters is known from the tokens of all experts
            assert not torch.equal(q.scales, nearest.scales)
            values = spread(q.scales, q.spec, q.shape)
            assert torch.equal(q.codes, nearest_codes(weight, q.spec, scales=values))


def test_a_gram_matrix_that_is_not_finite_is_said_and_survived(bench):
    def spoil(stats):
        stats["mlp.in"].gram[3, 3] = float("inf")

    b = bench("llama")
    ours = b.run(Gptq(bits=4, group_size=16, scales="search", descent=1), patch=spoil)
    noted = {row["linear"].rpartition(".")[2] for row in ours.rows if "note" in row}
    assert noted == {"gate_proj", "up_proj"}
    assert all(q.dequantize().isfinite().all() for q in ours.unit.quantized.values())


def test_parameters_are_those_of_the_grid():
    assert Gptq(bits=3, group_size=None).effects().scheme.weight.strategy == "channel"
    assert Gptq(grid="nvfp4", activations="calibrated").effects().scheme.input == ActivationSpec(
        "fp4_e2m1", "local", 16
    )
    assert Gptq(activations="token", bits=8).effects().scheme.input == ActivationSpec(
        "int8", "token"
    )
    assert Gptq(activations="static").needs().stats.absmax and not Gptq().needs().stats.absmax
    assert Gptq().needs().stats.cross and not Gptq(correction=0).needs().stats.cross
    for wrong, message in (
        ({"grid": "nvfp4", "bits": 3}, "bits says nothing"),
        ({"grid": "nvfp4", "scales": "search", "refits": 1}, "refits says nothing"),
        ({"rule": "mae"}, "rule says nothing"),
        ({"activations": "calibrated"}, "null, token, tensor, static"),
        ({"grid": "nvfp4", "activations": "token"}, "null, calibrated, dynamic"),
        ({"damping": 0}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=message):
            Gptq(**wrong)
