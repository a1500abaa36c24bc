"""The rtn and awq passes on one block of each family: what they change, and what they must not."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compressor.checkpoint.source import open_source
from compressor.ir import same_shape
from compressor.ir.qtensor import QuantSpec
from compressor.methods.awq.method import Awq
from compressor.methods.base import get_pass
from compressor.methods.gptq import Gptq
from compressor.methods.rtn import Rtn
from compressor.numerics import quantize
from tests.support.block_bench import BlockBench
from tests.support.planned import planned
from tests.support.tiny_models import TYPES


@pytest.fixture
def bench(tiny_model):
    """Makes blocks with inputs whose channels differ in size."""

    def make(model_type, *, rows=4, length=32):
        b = BlockBench(tiny_model(model_type), rows=rows, length=length)
        norm = next(x for x in b.layout.norms if x.role == "norm.attn")
        weight = b.unit.tensors[f"{norm.name}.weight"]
        outliers = torch.ones_like(weight)
        outliers[::9] = 8.0
        louder = (weight + norm.offset) * outliers - norm.offset
        b.unit = b.unit.with_tensors({f"{norm.name}.weight": louder})
        return b

    return make


@pytest.mark.parametrize("model_type", TYPES)
def test_awq_without_rounding_leaves_the_block_as_it_is(model_type, bench):
    """Scales are folded exactly: only rounding may change what the block computes."""
    b = bench(model_type)
    result = b.run(Awq(clip=False, min_tokens=8), spec=QuantSpec("int", 3, "group", 16))
    assert any(row["ratio"] for row in result.rows), "nothing was scaled"
    changed = [n for n, t in result.unit.tensors.items() if not torch.equal(t, b.unit.tensors[n])]
    assert changed and not result.unit.quantized
    torch.testing.assert_close(b.output(result.unit), b.output(b.unit), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_awq_beats_rounding_to_nearest(model_type, bench):
    b = bench(model_type)
    plain = b.run(Rtn(bits=3, group_size=16, symmetric=False))
    ours = b.run(Awq(bits=3, group_size=16, symmetric=False, min_tokens=8))
    every = {x.name for x in b.layout.linears if x.role != "router"}
    for result in (plain, ours):
        assert set(result.unit.quantized) == every
        assert [row["linear"] for row in result.rows] == [
            x.name for x in b.layout.linears if x.name in every
        ]
    assert b.error(ours) < b.error(plain)
    worse = [
        (a["linear"], a["error"], p["error"])
        for a, p in zip(ours.rows, plain.rows, strict=True)
        if a["error_of"] == p["error_of"] == "output" and a["error"] > 1.1 * p["error"]
    ]
    assert len(worse) <= len(every) // 4, worse


@pytest.mark.parametrize("options", [{"search": "reference"}, {"duo": True}, {"clip": False}])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_variants_beat_rounding_to_nearest(model_type, options, bench):
    b = bench(model_type)
    plain = b.run(Rtn(bits=3, group_size=16, symmetric=False))
    ours = b.run(Awq(bits=3, group_size=16, symmetric=False, min_tokens=8, **options))
    assert b.error(ours) < b.error(plain)


@pytest.mark.parametrize("step", [Rtn(bits=4, group_size=32), Awq(bits=4, group_size=32)])
def test_scales_are_in_the_dtype_the_plan_chose(step, bench):
    b = bench("llama")
    spec = replace(step.effects().scheme.weight, scale_dtype=torch.float16)
    result = b.run(step, spec=spec)
    for q in result.unit.quantized.values():
        assert q.spec == spec and q.scales.dtype == torch.float16
        assert q.scales.isfinite().all() and (q.scales != 0).all()
    assert all(row["error"] < 0.1 for row in result.rows)


def test_without_bits_the_clipped_weights_are_left_for_the_quantizer(bench):
    """awq then rtn is awq with bits, up to where a scale is rounded."""
    b = bench("llama")
    whole = b.run(Awq(bits=3, group_size=16))
    spec = whole.unit.quantized["model.layers.1.mlp.up_proj"].spec
    half = b.run(Awq(), spec=spec)
    assert not half.unit.quantized
    for linear in b.layout.linears:
        q = quantize(half.unit.weight(linear), spec)
        assert torch.equal(q.codes, whole.unit.quantized[linear.name].codes), linear.name


def test_a_quantizer_that_searches_ranges_gets_whole_weights(bench):
    b = bench("llama")
    made = b.run(Awq(), then=Gptq(bits=3, group_size=16)).unit
    clipped = b.run(Awq(), then=Gptq(bits=3, group_size=16, scales="range")).unit
    assert made.divisors.keys() == {fold.site for fold in b.layout.folds}
    makers = {fold.source for fold in b.layout.folds}
    cut = 0
    for x in b.layout.linears:
        if x.name not in makers:
            back = made.weight(x) / made.divisors[x.site]
            assert torch.allclose(back, b.unit.weight(x), rtol=1e-4, atol=1e-7), x.name
            cut += not torch.equal(clipped.weight(x), made.weight(x))
    assert cut


def test_experts_that_saw_no_tokens_are_rounded_without_data(bench):
    """Five tokens through two experts each of four: not every expert sees four of them."""
    b = bench("mixtral", rows=1, length=5)
    result = b.run(Awq(bits=4, group_size=16, min_tokens=4))
    noted = [row for row in result.rows if "note" in row]
    experts = {row["linear"].split(".experts.")[1][0] for row in noted}
    assert experts and all(".experts." in row["linear"] for row in noted)
    assert {row["error_of"] for row in noted} == {"weight"}
    for row in result.rows:
        assert row["error"] == row["error"]
        q = result.unit.quantized[row["linear"]]
        assert q.dequantize().isfinite().all()
    by_name = {x.name: x for x in b.layout.linears}
    for row in noted:
        linear = by_name[row["linear"]]
        if linear.role == "expert.down":
            plain = quantize(b.unit.weight(linear), result.unit.quantized[linear.name].spec)
            assert torch.equal(result.unit.quantized[linear.name].codes, plain.codes)


@pytest.mark.parametrize(
    "step",
    [
        Awq(bits=3, group_size=16, symmetric=False, min_tokens=60),  # not all experts see as many
        Awq(bits=4, group_size=None, duo=True, min_tokens=8),
        Awq(min_tokens=8),
    ],
)
def test_experts_worked_on_together_come_out_as_each_by_itself(step, bench, monkeypatch):
    b = bench("mixtral")
    spec = QuantSpec("int", 3, "group", 16)
    alone = b.run(step, spec=spec)
    monkeypatch.setattr(same_shape, "STACKS", 1)
    assert max(map(len, same_shape.of_one_shape(b.layout.linears, lambda x: x.role))) > 1
    together = b.run(step, spec=spec)
    for row, other in zip(together.rows, alone.rows, strict=True):
        assert row == pytest.approx(other)
    for name, q in alone.unit.quantized.items():
        found = together.unit.quantized[name]
        assert torch.equal(found.codes, q.codes) and torch.equal(found.scales, q.scales)
    for name, tensor in alone.unit.tensors.items():
        assert torch.equal(together.unit.tensors[name], tensor), name


def test_a_site_is_rescaled_only_if_all_that_reads_it_takes_part(bench):
    b = bench("llama")
    result = b.run(Awq(bits=3, group_size=16, ignore=["attn.k"]))
    ratios = {row["linear"].rpartition(".")[2]: row["ratio"] for row in result.rows}
    assert ratios["q_proj"] is None and ratios["v_proj"] is None
    assert ratios["gate_proj"] is not None
    untouched = next(x for x in b.layout.linears if x.role == "attn.k")
    assert torch.equal(result.unit.weight(untouched), b.unit.weight(untouched))
    norm = next(x for x in b.layout.norms if x.role == "norm.attn")
    name = f"{norm.name}.weight"
    assert torch.equal(result.unit.tensors[name], b.unit.tensors[name])


def test_the_source_unit_is_left_as_it_is(bench):
    b = bench("opt")
    before = {name: tensor.clone() for name, tensor in b.unit.tensors.items()}
    b.run(Awq(bits=4, group_size=16))
    assert all(torch.equal(before[name], tensor) for name, tensor in b.unit.tensors.items())


def test_parameters():
    assert get_pass("rtn") is Rtn and get_pass("awq") is Awq
    assert Awq().effects().scheme is None
    spec = Awq(bits=3, group_size=None, symmetric=False).effects().scheme.weight
    assert (spec.bits, spec.strategy, spec.zero) == (3, "channel", "subtract")
    assert Rtn(bits=8, group_size=64).effects().scheme.weight == QuantSpec("int", 8, "group", 64)
    with pytest.raises(ValidationError, match="without bits"):
        Awq(group_size=64)
    with pytest.raises(ValidationError):
        Rtn(bits=9)


def test_a_group_that_does_not_divide_is_explained(tiny_model):
    context = planned(open_source(tiny_model("llama")).layout)
    error, of_down = Rtn(bits=4, group_size=128).check(context)
    assert "the model's 96 inputs; 32, 16 would" in of_down.message
    first = context.selected[0].name
    assert error.message == (
        f"13 linears ({first}, …): group_size 128 does not divide the model's 64 inputs; "
        "64, 32, 16 would"
    )
    assert not [*Rtn(group_size=None).check(context)] and not [*Awq().check(context)]


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_eight_bits_beside_int8_inputs_are_by_channel(name: str) -> None:
    kind = get_pass(name)
    assert kind(bits=8, activations="token").group_size is None
    assert kind(bits=8, activations="token", group_size=64).group_size == 64
    assert kind(bits=8).group_size == kind(bits=4, activations="token").group_size == 128
