"""The reconstruct pass on one block, and what it falls back to."""

import gc
import weakref

import pytest
import torch
from compressor_calibration.stats import StatNeeds

from compressor.methods.gptq import Gptq
from compressor.methods.reconstruct import Reconstruct, RefinedRounding, refined_rounding
from compressor.numerics.learned_grid import moved_codes
from compressor.runner.tunable_block import TunableBlock
from tests.support.block_bench import BlockBench

GRID = {"bits": 3, "group_size": 16, "damping": 0.1, "min_tokens": 16}
FAST = {
    **GRID,
    "preset": "fast",
    "batch": 4,
    "held_back": 4,
    "correction": 0.0,
    "scale_rate": 0.002,
}


@pytest.fixture(scope="module")
def bench(tiny_model):
    found = {}

    def get(kind):
        if kind not in found:
            found[kind] = BlockBench(tiny_model(kind), rows=40, wanted=StatNeeds(gram=True))
        return found[kind]

    return get


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_refining_brings_the_block_closer_than_gptq_does(model_type, symmetric, bench):
    b = bench(model_type)
    start = b.run(Gptq(**GRID, scales="search", symmetric=symmetric))
    ours = b.run(Reconstruct(**FAST, symmetric=symmetric))
    assert ours.rows[0]["loss"] < ours.rows[0]["loss_of_start"]
    assert b.error(ours) < b.error(start)
    for name, q in ours.unit.quantized.items():
        before = start.unit.quantized[name]
        assert q.scales.dtype == before.scales.dtype and int(q.codes.max()) < 8
        assert (q.scales * before.scales > 0).all() and torch.equal(q.codes, before.codes)
        assert symmetric or torch.equal(q.zeros, before.zeros)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_with_few_tokens_keep_the_nearest_codes(model_type, bench):
    """Others, and what all tokens go through, are refined without them."""
    b = bench(model_type)
    stats = b.observe(b.unit, Gptq(correction=0))
    outputs = [x for x in b.layout.linears if x.role == "expert.down"]
    of = {x.expert: stats[x.site].tokens for x in outputs}
    few = sorted(of.values())[len(of) // 2]
    ours = b.run(Reconstruct(**{**FAST, "min_tokens": few}))
    start = b.run(Gptq(**{**GRID, "min_tokens": few}, correction=0.0)).unit.quantized
    kept = 0
    for linear in b.layout.linears:
        if linear.role == "router":
            continue
        q = ours.unit.quantized[linear.name]
        moved = not torch.equal(q.scales, start[linear.name].scales)
        assert moved == (linear.expert is None or of[linear.expert] >= few), linear.name
        kept += not moved
    assert ours.rows[0]["linears_kept_nearest"] == kept > 0
    assert ours.rows[0]["loss"] < ours.rows[0]["loss_of_start"]


FLOATS = {k: v for k, v in FAST.items() if k not in GRID} | {"damping": 0.1, "min_tokens": 16}


@pytest.mark.parametrize("grid", ["nvfp4", "mxfp4"])
def test_floats_are_refined_from_searched_scales(grid, bench):
    b = bench("llama")
    plain = b.run(Gptq(grid=grid, damping=0.1, min_tokens=16, scales="range"))
    start = b.run(Gptq(grid=grid, damping=0.1, min_tokens=16, scales="search"))
    ours = b.run(Reconstruct(**FLOATS, grid=grid))
    assert ours.rows[0]["loss"] <= ours.rows[0]["loss_of_start"]
    assert b.error(ours) < b.error(plain) and b.error(ours) <= b.error(start) * 1.001
    for name, q in ours.unit.quantized.items():
        assert q.spec == start.unit.quantized[name].spec
        assert q.second is None or torch.equal(q.second, start.unit.quantized[name].second)


@pytest.mark.parametrize("mode", ["token", "static"])
def test_inputs_are_quantized_in_the_forward_pass(mode, bench):
    b = bench("llama")
    step = Reconstruct(**{**FAST, "bits": 4}, activations=mode)
    ours, scheme = b.run(step), step.effects().scheme
    exact = (b.output(ours.unit, scheme) - b.output(b.unit))[:, :-1].square().mean().item()
    assert ours.rows[0]["loss"] == pytest.approx(exact, rel=0.5)
    assert ours.rows[0]["loss"] != pytest.approx(
        b.run(Reconstruct(**{**FAST, "bits": 4})).rows[0]["loss"]
    )
    assert (set(ours.unit.input_scales) == set(ours.unit.quantized)) == (mode == "static")


def test_codes_move_where_they_may(bench):
    b = bench("llama")
    step = Reconstruct(**FAST, reach=1.0)
    start = b.run(Gptq(**GRID, scales="search")).unit.quantized
    ours = b.run(step)
    assert ours.rows[0]["loss"] <= ours.rows[0]["loss_of_start"]
    moved = RefinedRounding(
        b.unit.weight(b.layout.linears[0]), start[b.layout.linears[0].name], moving=True
    )
    assert torch.equal(moved.quantized().codes, start[b.layout.linears[0].name].codes)
    moved.offsets.data += 1
    codes = (start[b.layout.linears[0].name].codes + 1).clamp(max=7)
    assert torch.equal(moved.quantized().codes, codes)


def test_what_is_not_better_on_rows_held_back_is_not_taken(bench, monkeypatch):
    b = bench("llama")
    start = b.run(Gptq(**GRID, scales="search"))
    found = TunableBlock.loss_and_folded

    def uphill(self, weights, rows):
        loss, gradients = found(self, weights, rows)
        return loss, [-gradient for gradient in gradients]

    monkeypatch.setattr(TunableBlock, "loss_and_folded", uphill)
    ours = b.run(Reconstruct(**FAST))
    assert "its start is kept" in ours.rows[0]["note"] and ours.rows[0]["best_step"] == 0
    for name, q in ours.unit.quantized.items():
        assert torch.equal(q.codes, start.unit.quantized[name].codes)
        assert torch.equal(q.scales, start.unit.quantized[name].scales)


@pytest.mark.parametrize("grid", [{**GRID, "symmetric": False}, {"grid": "nvfp4"}])
def test_a_gradient_of_scales_is_that_of_the_weight_they_make(grid, bench):
    b = bench("llama")
    linear, draw = b.layout.linears[0], torch.Generator().manual_seed(3)
    start = b.run(Gptq(**{**grid, "damping": 0.1, "min_tokens": 16})).unit.quantized[linear.name]
    refined = refined_rounding(b.unit.weight(linear), start, moving=False)
    refined.logs.data += 0.02 * torch.randn(refined.logs.shape, generator=draw)
    weight, made = refined.weight(), torch.empty(refined.shape, requires_grad=True)
    with torch.no_grad():
        refined.write(made)
    assert torch.allclose(made, weight, rtol=1e-6)
    gradient = torch.randn(weight.shape, generator=draw)
    (wanted,) = torch.autograd.grad(weight, refined.logs, gradient)
    folded = refined.fold(gradient)
    assert folded.shape == refined.folded
    (ours,) = torch.autograd.grad(refined.scales_made(), refined.logs, folded)
    assert wanted.abs().sum() > 0 and torch.allclose(ours, wanted, rtol=1e-4, atol=1e-7)


def test_codes_move_to_the_nearest_and_pass_gradients_inside_the_grid(bench):
    spec = Reconstruct(bits=2).effects().scheme.weight
    positions = torch.tensor([-0.7, 0.4, 1.6, 3.8], requires_grad=True)
    codes = moved_codes(positions, spec)
    codes.sum().backward()
    assert codes.tolist() == [0, 0, 2, 3] and positions.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("reach", [0.0, 0.3])
def test_the_memory_of_a_block_is_free_once_it_has_been_refined(reach, bench, monkeypatch):
    """And not when garbage is next looked for: the next block is worked on before that."""
    b, made, init = bench("llama"), [], TunableBlock.__init__

    def noted(self, *args, **kwargs):
        made.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(TunableBlock, "__init__", noted)
    gc.disable()
    try:
        b.run(Reconstruct(**FAST, reach=reach))
        assert [block() for block in made] == [None]
    finally:
        gc.enable()
