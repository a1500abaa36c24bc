"""The signround pass on one block of each family, and its place in a plan."""

import pytest
import torch
from compressor_calibration.stats import StatNeeds

from compressor.methods.awq.method import Awq
from compressor.methods.rtn import Rtn
from compressor.methods.signround import Signround
from compressor.runner.tunable_block import TunableBlock
from tests.support.block_bench import BlockBench

FAST = {"group_size": 16, "steps": 30, "batch": 4, "rate": 0.03}


@pytest.fixture
def bench(tiny_model):
    return lambda kind, **options: BlockBench(tiny_model(kind), wanted=StatNeeds(), **options)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral", "gpt_oss", "gpt_neox"])
def test_the_block_comes_closer_than_by_rounding_to_nearest(model_type, symmetric, bench):
    b = bench(model_type)
    grid = {"bits": 3, "symmetric": symmetric}
    plain = b.run(Rtn(**grid, group_size=16))
    ours = b.run(Signround(**grid, **FAST))
    assert set(ours.unit.quantized) == set(plain.unit.quantized)
    assert b.error(ours) < 0.85 * b.error(plain)
    block = ours.rows[0]
    assert block["block"] == b.layout.name and block["loss"] < block["loss_of_nearest"]
    want, got = b.output(b.unit), b.output(ours.unit)
    exact = (got - want)[:, :-1].square().mean().item()
    assert block["loss"] == pytest.approx(exact, rel=1e-3)


def test_channels_and_bits(bench):
    b = bench("llama")
    for bits in (2, 8):
        ours = b.run(Signround(bits=bits, **{**FAST, "group_size": None, "steps": 5}))
        for q in ours.unit.quantized.values():
            assert q.scales.shape == (q.shape[0], 1) and int(q.codes.max()) < 2**bits


@pytest.mark.parametrize("grid", ["nvfp4", "mxfp4"])
def test_floats_are_learned(grid, bench):
    b = bench("llama")
    fast = {"grid": grid, "steps": 30, "batch": 4, "rate": 0.03}
    plain = b.run(Signround(**{**fast, "steps": 1, "rate": 1e-9}))
    ours = b.run(Signround(**fast))
    assert ours.rows[0]["loss"] < ours.rows[0]["loss_of_nearest"]
    assert b.error(ours) < 0.9 * b.error(plain)
    seconds = {x.fused: ours.unit.quantized[x.name].second for x in b.layout.linears if x.fused}
    for x in b.layout.linears:
        second = ours.unit.quantized[x.name].second
        assert (second is None) == (grid == "mxfp4")
        assert second is None or not x.fused or torch.equal(second, seconds[x.fused])


def test_a_run_repeats_itself(bench):
    b = bench("mixtral")
    first, second = (b.run(Signround(bits=3, **FAST)).unit.quantized for _ in range(2))
    assert all(torch.equal(q.codes, second[name].codes) for name, q in first.items())


def test_a_fit_that_diverges_keeps_rounding_to_nearest_and_says_so(bench, monkeypatch):
    b = bench("llama")
    one = b.run(Signround(bits=3, **{**FAST, "steps": 1}))
    nearest = Signround(bits=3, **{**FAST, "steps": 1, "rate": 1e-9})
    assert one.rows[0]["best_step"] == 0 and "note" in one.rows[0]  # nothing had changed by then
    found = TunableBlock.loss_and_gradients

    def broken(self, weights, rows, owners):
        loss, gradients = found(self, weights, rows, owners)
        return loss * float("nan"), gradients

    monkeypatch.setattr(TunableBlock, "loss_and_gradients", broken)
    spoiled = b.run(Signround(bits=3, **FAST))
    assert "kept" in spoiled.rows[0]["note"]
    start = b.run(nearest).unit.quantized
    for name, q in spoiled.unit.quantized.items():
        assert torch.equal(q.codes, start[name].codes)


def test_awq_may_go_before_it(bench):
    b = bench("llama")
    scaled = b.run(Awq(min_tokens=8), then=Signround(bits=3, **FAST)).unit
    ours = b.run(Signround(bits=3, **FAST), unit=scaled)
    assert b.error(ours) < b.error(b.run(Rtn(bits=3, group_size=16), unit=scaled))
