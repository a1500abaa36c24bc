"""Passes that belong together plan; the plan says why others do not."""

import re

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.cli.commands.plan import layers, ranges
from compressor.errors import Problems
from compressor.plan.estimate import estimate
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe

CORRECTED = {"group_size": 32, "correction": 0.3}
RTN = {"rtn": {"bits": 4, "group_size": 32}}
W8A8 = {"rtn": {"bits": 8, "group_size": None, "activations": "token"}}


@pytest.fixture
def plan(tiny_model):
    def make(passes, *, model="llama", format="compressed-tensors", **top):
        data = {"model": "m", "output": "o", "passes": passes, "format": format, **top}
        return make_plan(make_recipe(data), open_source(tiny_model(model)))

    return make


@pytest.mark.parametrize(
    "passes",
    [
        ["smoothquant", W8A8],
        [{"smoothquant": {"alpha": "search"}}, W8A8],
        ["smoothquant"],
        ["awq", "nvfp4"],
        [{"awq": {"search": "inputs"}}, {"nvfp4": {"activations": "calibrated"}}],
        ["smoothquant", "awq", RTN],
        ["fp8", "kv_cache"],
        ["kv_cache", RTN],
        ["smooth_attention", "kv_cache", RTN],
        [{"awq": {"bits": 4, "group_size": 32}}, "kv_cache"],
        ["kv_cache", {"gptq": CORRECTED}],
        ["kv_cache", "smoothquant", W8A8],
        [{"fp8": {"targets": "attn.*"}}, {"nvfp4": {"targets": "mlp.*"}}],
        [{"rtn": {**RTN["rtn"], "ignore": ["lm_head", "layers.0.*"]}}],
    ],
)
def test_what_fits(passes, plan):
    plan(passes, format="dense" if passes == ["smoothquant"] else "compressed-tensors")


@pytest.mark.parametrize(
    "passes, reason",
    [
        (["awq"], "searches with the quantizer that follows it, but none quantizes"),
        ([{"smoothquant": {"alpha": "search"}}], "but none quantizes"),
        (["awq", {"rtn": {**RTN["rtn"], "targets": "mlp.*"}}], "but none quantizes 8 linears"),
        (["nvfp4", "awq"], "awq .pass 2. changes weights after"),
        (["fp8", "nvfp4"], "is a second quantizer for"),
        ([{"smoothquant": {"bits": 8}}, RTN], "is a second quantizer for"),
        (["kv_cache", "smooth_attention", RTN], "which smooth_attention changes after it"),
        (["kv_cache", "awq", RTN], "which awq changes after it"),
        (["kv_cache", {"awq": {"bits": 4, "group_size": 32}}], "which awq changes after it"),
        ([{"smooth_attention": {"alpha": "search"}}, RTN], "nothing rounds them"),
        (["kv_cache", {"kv_cache": {"element": "int8"}}, RTN], "both quantize the KV cache"),
        (
            [{"nvfp4": {"targets": ["attn.q"]}}, {"nvfp4": {"targets": ["attn.k", "attn.v"]}}],
            "whose parts have one scale in runtimes",
        ),
        (
            [{"rtn": {**RTN["rtn"], "targets": "attn.q"}}, {"fp8": {"targets": "mlp.*"}}],
            "different schemes",
        ),
    ],
)
def test_what_makes_no_sense(passes, reason, plan):
    with pytest.raises(Problems) as found:
        plan(passes)
    message = " ".join(problem.message for problem in found.value.problems)
    assert re.search(reason, message), message


def test_a_transform_that_changes_what_a_quantized_linear_reads(plan):
    passes = [
        {"rtn": {**RTN["rtn"], "targets": ["attn.q", "attn.k", "attn.v"]}},
        {"smoothquant": {"targets": ["attn.o", "mlp.*"]}},
    ]
    plan(passes)
    passes = [
        {"rtn": {**RTN["rtn"], "targets": ["mlp.gate", "mlp.up"]}},
        {"smoothquant": {"targets": ["attn.*", "mlp.*"]}},
    ]
    with pytest.raises(Problems, match="changes weights after"):
        plan(passes)


@pytest.mark.parametrize(
    "passes, format, reason",
    [
        (["fp8"], "autoawq", "cannot hold"),
        ([{"nvfp4": {"activations": "dynamic"}}], "modelopt-nvfp4", "calibrated global scale"),
        (["fp8", {"kv_cache": {"element": "int4"}}], "compressed-tensors", "int4 KV cache"),
        ([{"fp8": {"scales": "block"}}], "compressed-tensors", "groups of 128"),
    ],
)
def test_formats_that_cannot_hold_it(passes, format, reason, plan):
    with pytest.raises(Problems) as found:
        plan(passes, format=format)
    assert reason in " ".join(problem.message for problem in found.value.problems)


def test_the_plan_shows_what_every_layer_becomes(plan):
    made = plan(
        [
            {"rtn": {**RTN["rtn"], "ignore": ["lm_head", "mlp.down", "layers.0.*"]}},
            {"rtn": {"bits": 8, "group_size": 32, "targets": ["layers.1.mlp.down_proj"]}},
            "kv_cache",
        ]
    )
    text = layers(made)
    assert "  attn.q           1 x unchanged, blocks 0" in text
    assert "  attn.q           1 x int4 group 32 symmetric, blocks 1" in text
    assert "  mlp.down         1 x int8 group 32 symmetric, blocks 1" in text
    assert text[-1].split() == ["KV", "cache", "fp8_e4m3,", "scales", "per", "tensor"]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges([]) == ""


def test_a_correction_wants_the_quantized_models_inputs(plan):
    with pytest.raises(Problems, match="corrects what rounding did") as raised:
        plan([{"gptq": CORRECTED}], propagate="original")
    assert "correction: 0" in str(raised.value.problems[0].hint)
    assert plan([{"gptq": {"group_size": 32}}]).two_streams
    assert not plan([{"gptq": {"group_size": 32}}], propagate="original").two_streams


def test_a_block_that_is_learned_wants_rows(plan):
    learned = {"signround": {"group_size": 32}}
    assert plan([learned]).two_streams and plan(["awq", learned]).units[1].tuned
    assert not plan([learned], propagate="original").two_streams
    with pytest.raises(Problems, match="each step reads 8 rows, but calibration has 4"):
        plan([learned], calibration={"samples": 4})
    assert plan(["rotate", learned], untie=True).two_streams
    with pytest.raises(Problems, match="group_size 48 does not divide"):
        plan([{"signround": {"group_size": 48}}])
    figures = [
        estimate(plan(passes), device=torch.device("cpu"), resident=0)
        for passes in ([RTN], [learned], [{"signround": {"group_size": 32, "steps": 2000}}])
    ]
    streams = 3 * 128 * 512 * 64 * 4  # rows, tokens, hidden size, float32
    assert figures[1].host_bytes - figures[0].host_bytes > streams
    assert figures[2].seconds - 5 > 9 * (figures[1].seconds - 5)


def test_two_streams_are_counted(plan):
    memory = [
        estimate(plan([{"gptq": options}]), device=torch.device("cpu"), resident=0).host_bytes
        for options in ({"group_size": 32, "correction": 0.0}, CORRECTED)
    ]
    stream = 128 * 512 * 64 * 4  # rows, tokens, hidden size, float32
    assert memory[1] - memory[0] > stream
