"""GPTQ against a slow and obvious version in float64, and what it promises for every row."""

import pytest
import torch

from compressor.ir.qtensor import NVFP4, QTensor, QuantSpec, spread
from compressor.numerics import nearest_codes, quantize
from compressor.numerics.gptq import gptq, inverse_factor, row_errors
from compressor.numerics.target_correction import correction

SPECS = {
    "int4 group": QuantSpec("int", 4, "group", 16),
    "int3 group zero": QuantSpec("int", 3, "group", 32, zero="subtract"),
    "int8 channel": QuantSpec("int", 8, "channel"),
    "int4 tensor": QuantSpec("int", 4, "tensor"),
    "nvfp4": NVFP4,
    "fp8 channel": QuantSpec("fp8_e4m3", 8, "channel"),
    "fp8 block": QuantSpec("fp8_e4m3", 8, "block", block=(16, 32)),
    "progressive offset": QuantSpec(
        "int", 4, "group", 32, zero="offset", scale_dtype=torch.int8, second="channel"
    ),
    "progressive subtract": QuantSpec(
        "int", 4, "group", 32, zero="subtract", scale_dtype=torch.int8, second="channel"
    ),
    "offset channel": QuantSpec("int", 4, "channel", zero="offset", scale_dtype=torch.float16),
}


def problem(rows=24, columns=160, tokens=400, seed=0):
    """A weight and the Gram matrix of inputs that depend on each other, some much larger."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(tokens, columns // 4, generator=generator) @ mix
    x = x + 0.3 * torch.randn(tokens, columns, generator=generator)
    x[:, ::7] *= 6
    return weight, x.T @ x


def slowly(weight, q, gram, *, damping, act_order):
    """Codes of the published recursion: the inverse is updated input by input, all in float64."""
    w, spec, count = weight.double().clone(), q.spec, weight.shape[1]
    h = gram.double().clone()
    h += damping * float(h.diagonal().mean()) * torch.eye(count, dtype=torch.float64)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    order = order if act_order else list(range(count))
    scales = spread(q.scales.float(), spec, q.shape).expand(q.shape)
    zeros = None if q.zeros is None else spread(q.zeros.float(), spec, q.shape).expand(q.shape)
    codes = torch.zeros_like(q.codes)
    inverse = torch.linalg.inv(h)
    for place, j in enumerate(order):
        codes[:, j : j + 1] = nearest_codes(
            w[:, j : j + 1].float(),
            spec,
            scales=scales[:, j : j + 1],
            zeros=None if zeros is None else zeros[:, j : j + 1],
            second=q.second,
        )
        made = QTensor(spec, codes, q.scales, q.zeros, q.second).dequantize(torch.float64)[:, j]
        later = order[place + 1 :]
        w[:, later] -= ((w[:, j] - made) / inverse[j, j])[:, None] * inverse[j, later]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_codes_are_those_of_the_slow_version(name, act_order):
    weight, gram = problem()
    nearest = quantize(weight, SPECS[name])
    inverse = inverse_factor(gram, act_order=act_order)
    (found,) = gptq([weight], [nearest], inverse)
    slow = slowly(weight, nearest, gram, damping=0.01, act_order=act_order)
    # A last bit may tip a weight that lies half way, and with it all after it in its row.
    changed = (found.q.codes != nearest.codes).any(1)
    same = (found.q.codes == slow).all(1) | ~changed
    assert same.float().mean() > 0.85
    assert changed.float().mean() > 0.85
    assert found.kept == int((~changed).sum())
    ours, theirs = (
        float(row_errors(q.dequantize() - weight, gram).sum())
        for q in (
            found.q,
            QTensor(nearest.spec, slow, nearest.scales, nearest.zeros, nearest.second),
        )
    )
    assert ours <= theirs * 1.01


@pytest.mark.parametrize("name", SPECS)
def test_no_row_is_worse_than_rounding_to_nearest(name):
    for seed in range(4):
        weight, gram = problem(rows=40, tokens=(400, 50, 170, 3)[seed], seed=seed)
        nearest = quantize(weight, SPECS[name])
        (found,) = gptq([weight], [nearest], inverse_factor(gram))
        before, after = (
            row_errors(q.dequantize(torch.float64) - weight.double(), gram.double())
            for q in (nearest, found.q)
        )
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum()
        for leaf in ("scales", "zeros", "second"):
            kept, made = getattr(nearest, leaf), getattr(found.q, leaf)
            assert (kept is None and made is None) or torch.equal(kept.float(), made.float()), leaf


def test_damping_is_that_of_inputs_before_they_were_divided() -> None:
    """Rescaling a problem rescales its solution."""
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 13)
    other = x + 0.1 * torch.randn(200, 12, generator=torch.Generator().manual_seed(2))
    gram, cross = x.T @ x, (other - x).T @ x
    s = torch.linspace(0.2, 5, 12)
    by = torch.outer(s, s)
    plain = inverse_factor(gram, damping=0.1)
    scaled = inverse_factor(gram / by, damping=0.1, divisor=s)
    assert plain is not None and scaled is not None
    assert torch.allclose(scaled.damped * by, plain.damped, rtol=1e-4)
    one = correction(gram, cross, strength=0.5)
    two = correction(gram / by, cross / by, strength=0.5, divisor=s)
    assert one is not None and two is not None
    assert torch.allclose(s[:, None] * two / s, one, rtol=1e-3, atol=1e-5)


def test_a_row_that_would_lose_keeps_its_nearest_codes():
    """Inputs without a shared direction leave nothing to correct: all rows are kept."""
    weight, _ = problem()
    nearest = quantize(weight, SPECS["int4 group"])
    (found,) = gptq([weight], [nearest], inverse_factor(torch.eye(160)))
    assert found.kept == 24 and torch.equal(found.q.codes, nearest.codes)


def test_inputs_never_seen_are_rounded_to_nearest():
    weight, gram = problem()
    dead = [0, 17, 18, 159]
    gram[dead] = 0
    gram[:, dead] = 0
    nearest = quantize(weight, SPECS["int3 group zero"])
    (found,) = gptq([weight], [nearest], inverse_factor(gram))
    assert torch.equal(found.q.codes[:, dead], nearest.codes[:, dead])
    assert found.kept < 12


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_fewer_tokens_than_inputs(tokens):
    weight, gram = problem(tokens=tokens)
    inverse = inverse_factor(gram, damping=1e-9)
    nearest = quantize(weight, SPECS["int4 group"])
    (found,) = gptq([weight], [nearest], inverse)
    before, after = (
        float(row_errors(q.dequantize() - weight, gram).sum()) for q in (nearest, found.q)
    )
    assert after < before


def test_damping_grows_until_the_matrix_can_be_factored():
    _, gram = problem()
    gram -= 0.02 * gram.diagonal().mean() * torch.eye(160)  # no Gram matrix: rounding made it so
    assert float(torch.linalg.eigvalsh(gram.double()).min()) < 0
    inverse = inverse_factor(gram, damping=0.01)
    assert inverse is not None and inverse.damping > 0.01
    assert inverse_factor(torch.zeros(8, 8)) is None
    assert inverse_factor(torch.full((8, 8), torch.nan)) is None


def test_the_factor_is_that_of_the_inverse():
    _, gram = problem()
    inverse = inverse_factor(gram, damping=0.05)
    order = inverse.order
    damped = gram.double() + 0.05 * gram.double().diagonal().mean() * torch.eye(160)
    wanted = torch.linalg.inv(damped[order][:, order])
    factor = inverse.factor.double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.T @ factor, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max())
    )


def test_weights_that_share_an_input_are_rounded_alone_or_together(monkeypatch):
    weight, gram = problem(rows=40)
    parts = [weight[:8], weight[8:33], weight[33:]]
    inverse = inverse_factor(gram)
    for spec in (NVFP4, SPECS["progressive offset"], SPECS["fp8 block"]):
        nearest = [quantize(part, spec) for part in parts]
        together = gptq(parts, nearest, inverse)
        alone = [gptq([part], [q], inverse)[0] for part, q in zip(parts, nearest, strict=True)]
        monkeypatch.setattr("compressor.numerics.gptq.ROOM", {"cpu": 160 * 11, "cuda": 1})
        chunked = gptq(parts, nearest, inverse)
        monkeypatch.undo()
        for one, two, three in zip(together, alone, chunked, strict=True):
            assert torch.equal(one.q.codes, two.q.codes) and one.kept == two.kept
            assert torch.equal(one.q.codes, three.q.codes) and one.kept == three.kept
            assert torch.equal(one.q.scales.float(), two.q.scales.float())


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_a_gpu_finds_what_a_cpu_finds(name):
    weight, gram = problem(rows=200, columns=288)
    nearest = quantize(weight, SPECS[name])
    (ours,) = gptq([weight], [nearest], inverse_factor(gram))
    (theirs,) = gptq([weight.cuda()], [nearest.to("cuda")], inverse_factor(gram.cuda()))
    assert theirs.q.codes.is_cuda
    assert theirs.error == pytest.approx(ours.error, rel=0.02)
    assert (theirs.q.codes.cpu() == ours.q.codes).float().mean() > 0.9


@pytest.mark.parametrize("descent", [0, 1])
def test_rows_are_rounded_in_parts_as_they_are_together(descent):
    weight, gram = problem()
    inverse, spec = inverse_factor(gram, damping=0.1), SPECS["int3 group zero"]
    weights = [weight[:7], weight[7:]]
    nearest = [quantize(w, spec) for w in weights]
    whole, parts = (
        gptq(weights, nearest, inverse, descent=descent, refits=descent, parts=n) for n in (1, 3)
    )
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.q.codes, other.q.codes) and one.kept == other.kept
        assert torch.equal(one.q.scales, other.q.scales)
        assert other.error == pytest.approx(one.error, rel=1e-3)
