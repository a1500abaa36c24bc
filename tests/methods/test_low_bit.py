"""smoothquant, fp8 and nvfp4 on one block of each family: what they change, and what they keep."""

import pytest
import torch
from compressor_calibration.stats import StatNeeds
from pydantic import ValidationError

from compressor.checkpoint.source import open_source
from compressor.ir.layout import Linear, ModelLayout, Sizes, UnitLayout
from compressor.ir.qtensor import NVFP4, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.methods.awq.method import Awq
from compressor.methods.base import get_pass
from compressor.methods.fp8 import Fp8
from compressor.methods.mxfp4 import Mxfp4
from compressor.methods.mxfp8 import Mxfp8
from compressor.methods.nvfp4 import Nvfp4
from compressor.methods.rtn import Rtn
from compressor.methods.smoothquant import Smoothquant
from compressor.numerics import quantize
from compressor.numerics.activations import fake_quantize_activation
from compressor.numerics.folding import fold
from compressor.numerics.nvfp4 import shared_absmax
from tests.support.block_bench import BlockBench
from tests.support.planned import planned
from tests.support.tiny_models import TYPES

W8A8 = Scheme(QuantSpec("int", 8, "channel"), ActivationSpec("int8", "token"))


def outlying(folder, *, rows=4, length=32, outlier=20.0):
    """A block rescaled so that its inputs have outlier channels."""
    b = BlockBench(folder, rows=rows, length=length, wanted=StatNeeds(absmax=True))
    for found in b.layout.folds:
        if found.kind == "norm":
            scales = torch.ones(b.hidden.shape[-1])
            scales[::9] = 1 / outlier
            b.unit = b.unit.with_tensors(fold(b.unit.tensors, found, b.layout, scales))
    return b


@pytest.fixture
def bench(tiny_model):
    return lambda model_type, **options: outlying(tiny_model(model_type), **options)


def linear(b, role):
    return next(x for x in b.layout.linears if x.role == role)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("fold_up", [False, True])
def test_migration_leaves_the_block_as_it_is(model_type, fold_up, bench):
    b = bench(model_type)
    result = b.run(Smoothquant(fold_up=fold_up))
    assert not result.unit.quantized
    torch.testing.assert_close(b.output(result.unit), b.output(b.unit), rtol=2e-4, atol=2e-4)
    scaled = {row["linear"] for row in result.rows if row["alpha"] is not None}
    roles = {x.role for x in b.layout.linears if x.name in scaled}
    assert roles & {"attn.q", "attn.qkv"} and roles & {"mlp.up", "mlp.gate_up", "expert.up"}
    assert "attn.o" not in roles
    assert any(role.endswith(".down") for role in roles) == fold_up
    published = {"opt": 0.5, "llama": 0.85, "mistral": 0.8, "mixtral": 0.8}.get(model_type, 0.5)
    assert {row["alpha"] for row in result.rows} - {None} == {published}


@pytest.mark.parametrize("model_type", TYPES)
def test_w8a8_with_migration_beats_w8a8_without(model_type, bench):
    b = bench(model_type)
    naive = b.run(Rtn(bits=8, group_size=None, activations="token"))
    ours = b.run(Smoothquant(bits=8, alpha=0.5))
    assert set(ours.unit.quantized) == {x.name for x in b.layout.linears if x.role != "router"}
    assert b.error(ours, W8A8) < 0.5 * b.error(naive, W8A8)


@pytest.mark.parametrize("activations", ["token", "tensor", "static"])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral"])
def test_levels(model_type, weights, activations, bench):
    """O1 to O3 and their forms per channel; static scales are those of the smoothed inputs."""
    b = bench(model_type)
    step = Smoothquant(bits=8, weights=weights, activations=activations, fold_up=True)
    result = b.run(step)
    assert b.error(result, step.effects().scheme) < 0.02
    every = {x.name for x in b.layout.linears if x.role != "router"}
    assert set(result.unit.input_scales) == (every if activations == "static" else set())
    if activations == "static":
        smoothed = b.run(Smoothquant(fold_up=True)).unit
        seen = b.observe(smoothed, step)
        for x in b.layout.linears:
            if x.name in every and seen[x.site].tokens:
                scale = result.unit.input_scales[x.name]
                torch.testing.assert_close(
                    scale, seen[x.site].absmax.amax().reshape(1) / 127, rtol=1e-4, atol=0
                )


@pytest.mark.parametrize("activations", ["token", "static"])
def test_the_searched_exponent_is_no_worse_than_any_fixed_one(activations, bench):
    """In the errors of single linears, which it is judged by."""
    b = bench("llama")
    x = linear(b, "attn.q")
    seen = b.observe(b.unit, Smoothquant(alpha="search"))[x.site]
    inputs, weight = seen.inputs.float(), b.unit.weight(x)

    def error(alpha):
        if alpha is None:
            step = Rtn(bits=8, group_size=None, activations=activations, targets="attn.q")
        else:
            step = Smoothquant(bits=8, alpha=alpha, activations=activations, targets="attn.q")
        unit = b.run(step).unit
        q = unit.quantized[x.name]
        norm = f"{linear_norm(b)}.weight"
        ratio = unit.tensors[norm] / b.unit.tensors[norm]
        entering = fake_quantize_activation(
            inputs * ratio, step.effects().scheme.input, unit.input_scales.get(x.name)
        )
        return float((entering @ q.dequantize().t() - inputs @ weight.t()).square().sum())

    best = error("search")
    assert best <= min(error(alpha / 10) for alpha in range(11)) * 1.01
    assert best < 0.2 * error(None)


def linear_norm(b):
    return next(n.name for n in b.layout.norms if n.role == "norm.attn")


def test_a_dead_channel_keeps_its_scale(bench):
    b = bench("llama")
    norm = f"{linear_norm(b)}.weight"
    weight = b.unit.tensors[norm].clone()
    weight[7] = 0.0
    b.unit = b.unit.with_tensors({norm: weight})
    result = b.run(Smoothquant(bits=8))
    assert result.unit.tensors[norm][7] == 0
    assert all(q.dequantize().isfinite().all() for q in result.unit.quantized.values())
    smoothed = b.run(Smoothquant()).unit.weight(linear(b, "attn.q"))
    torch.testing.assert_close(smoothed[:, 7], b.unit.weight(linear(b, "attn.q"))[:, 7])


def test_an_ignored_linear_takes_the_scale_of_its_site(bench):
    b = bench("llama")
    result = b.run(Smoothquant(bits=8, ignore=["attn.k"]))
    k = linear(b, "attn.k")
    assert k.name not in result.unit.quantized
    assert not torch.equal(result.unit.weight(k), b.unit.weight(k))
    assert b.error(result, W8A8) < 0.01


def test_experts_without_tokens_get_a_scale_all_the_same(bench):
    b = bench("mixtral", rows=1, length=2)
    result = b.run(Smoothquant(bits=8, activations="static", fold_up=True))
    down = [x.name for x in b.layout.linears if x.role == "expert.down"]
    scales = [float(result.unit.input_scales[name]) for name in down]
    assert len(down) == 4 and all(0 < scale < 1e3 for scale in scales)
    assert scales.count(max(scales)) > 1, "some expert saw no token"


@pytest.mark.parametrize("scales", ["dynamic", "static", "weights"])
@pytest.mark.parametrize("model_type", TYPES)
def test_fp8(model_type, scales, bench):
    b = bench(model_type, outlier=1.0)
    step = Fp8(scales=scales)
    result = b.run(step)
    assert 1e-6 < b.error(result, step.effects().scheme) < 0.05
    assert bool(result.unit.input_scales) == (scales == "static")
    if scales == "static":
        groups = {}
        for x in b.layout.linears:
            if x.fused and x.name in result.unit.quantized:
                scale = float(result.unit.quantized[x.name].scales)
                groups.setdefault((x.fused, x.expert, x.site), set()).add(scale)
        assert all(len(found) == 1 for found in groups.values())
        assert groups or model_type == "phi3"


def test_fp8_blocks(tiny_model):
    folder = tiny_model("llama", hidden_size=128, intermediate_size=256)
    b = outlying(folder)
    step = Fp8(scales="block")
    result = b.run(step)
    assert b.error(result, step.effects().scheme) < 0.02
    q = result.unit.quantized[linear(b, "mlp.gate").name]
    assert tuple(q.scales.shape) == (2, 1)
    narrow = planned(open_source(tiny_model("llama")).layout)
    assert all("dynamic would do" in error.message for error in step.check(narrow))
    assert len([*step.check(narrow)]) == 2 and not [*Fp8().check(narrow)]


@pytest.mark.parametrize("activations", ["none", "calibrated", "dynamic"])
@pytest.mark.parametrize("model_type", TYPES)
def test_nvfp4(model_type, activations, bench):
    b = bench(model_type, outlier=1.0)
    plain, ours = (Nvfp4(rule=rule, activations=activations) for rule in ("static_6", "mse"))
    results = [b.run(step) for step in (plain, ours)]
    assert bool(results[0].unit.input_scales) == (activations == "calibrated")
    weights = [sum(row["error"] for row in result.rows) for result in results]
    assert weights[1] < 0.95 * weights[0]
    assert b.error(results[1], ours.effects().scheme) < 0.2
    groups = {}
    for x in b.layout.linears:
        if x.name in results[1].unit.quantized:
            key = (x.fused, x.expert, x.site) if x.fused else x.name
            groups.setdefault(key, []).append(x)
    for fused in groups.values():
        amax = shared_absmax([b.unit.weight(x) for x in fused])
        for x in fused:
            q = results[1].unit.quantized[x.name]
            expected = quantize(b.unit.weight(x), NVFP4, rule="mse", amax=amax)
            assert torch.equal(q.second, expected.second) and torch.equal(q.codes, expected.codes)


def test_nvfp4_square_blocks(bench):
    b = bench("llama")
    q = b.run(Nvfp4(block="16x16")).unit.quantized[linear(b, "attn.o").name]
    scales = q.scales.float().view(-1, 16, q.scales.shape[1])
    assert torch.equal(scales, scales[:, :1].expand_as(scales))


def test_nvfp4_says_what_saturates(bench):
    b = bench("llama")
    x = linear(b, "attn.o")
    weight = b.unit.weight(x).clone() * 1e-6
    weight[0, 0] = 1e2
    b.unit = b.unit.with_tensors({f"{x.name}.weight": weight})
    # The largest value of a block whose scale rounds down to the smallest E4M3 number, 2^-9.
    weight[5, 16] = 1e2 / 2688 * 2**-9 * 8.5
    result = b.run(Nvfp4(rule="static_6"))
    notes = {row["linear"]: row.get("note", "") for row in result.rows}
    assert "saturate" in notes[x.name]
    value = result.unit.quantized[x.name].dequantize()[5, 16]
    assert float(value) == pytest.approx(1e2 / 2688 * 2**-9 * 6)


def test_awq_searches_with_nvfp4(bench):
    b = bench("llama")
    then = Nvfp4(activations="calibrated")
    plain = b.run(then)
    for search in ("gram", "inputs"):
        scaled = b.run(Awq(search=search), then=then)
        ratios = [row["ratio"] for row in scaled.rows]
        assert any(ratios)
        torch.testing.assert_close(b.output(scaled.unit), b.output(b.unit), rtol=2e-4, atol=2e-4)
        result = b.run(then, unit=scaled.unit)
        assert b.error(result, then.effects().scheme) < 0.8 * b.error(plain, then.effects().scheme)


def test_smoothquant_before_rounding_to_nearest_is_smoothquant_with_bits(bench):
    b = bench("llama")
    whole = b.run(Smoothquant(bits=8, activations="static"))
    then = Rtn(bits=8, group_size=None, activations="static")
    half = b.run(then, unit=b.run(Smoothquant(), then=then).unit)
    for name, q in whole.unit.quantized.items():
        assert torch.equal(q.codes, half.unit.quantized[name].codes)
        torch.testing.assert_close(
            whole.unit.input_scales[name], half.unit.input_scales[name], rtol=1e-4, atol=0
        )


def test_the_source_unit_is_left_as_it_is(bench):
    b = bench("opt")
    before = {name: tensor.clone() for name, tensor in b.unit.tensors.items()}
    for step in (Smoothquant(bits=8, fold_up=True), Fp8(), Nvfp4()):
        b.run(step)
    assert all(torch.equal(before[name], tensor) for name, tensor in b.unit.tensors.items())


def test_parameters():
    assert get_pass("smoothquant") is Smoothquant and get_pass("nvfp4") is Nvfp4
    assert Smoothquant().effects().scheme is None and not Smoothquant().needs().rounding
    assert Smoothquant(alpha="search").needs().rounding
    assert not Smoothquant(alpha="search", bits=8).needs().rounding
    with pytest.raises(ValidationError, match="without bits"):
        Smoothquant(activations="static")
    for bad in ({"alpha": 1.5}, {"bits": 4}, {"alpha": "auto"}):
        with pytest.raises(ValidationError):
            Smoothquant(**bad)
    with pytest.raises(ValidationError):
        Nvfp4(rule="best")


@pytest.mark.parametrize("step", [Mxfp4, Mxfp8])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("model_type", TYPES)
def test_microscaling(model_type, activations, step, bench):
    b = bench(model_type, outlier=1.0)
    rules = [step(rule=rule, activations=activations) for rule in ("nearest", "mse")]
    nearest, mse = (b.run(x) for x in rules)
    assert not mse.unit.input_scales
    assert sum(row["error"] for row in mse.rows) <= sum(row["error"] for row in nearest.rows)
    assert b.error(mse, rules[1].effects().scheme) < (0.3 if step is Mxfp4 else 0.05)
    for x in b.layout.linears:
        if x.name in mse.unit.quantized:
            expected = quantize(b.unit.weight(x), step.spec, rule="mse")
            assert torch.equal(mse.unit.quantized[x.name].codes, expected.codes)


def test_microscaling_needs_whole_groups():
    unit = UnitLayout("b", "block", 0, (), (Linear("a", "mlp.up", 8, 48, site="mlp.in"),))
    (error,) = Mxfp4().check(planned(ModelLayout("llama", (unit,), Sizes(48, 256))))
    assert error.message == "a: the model's 48 inputs do not divide into groups of 32"
