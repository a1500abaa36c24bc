"""Integer grids: bounds on the error, degenerate groups, and the fast path's equality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import InputError
from compressor.ir.qtensor import QuantSpec
from compressor.numerics import fake_quantize, quantize
from compressor.numerics.int_affine import fake_quantize_int, int_grid, nearest_int


def spec(bits=4, strategy="group", group_size=16, zero="none", scale_dtype=torch.float32):
    size = group_size if strategy == "group" else None
    return QuantSpec("int", bits, strategy, size, zero=zero, scale_dtype=scale_dtype)


def weight(rows=24, columns=64, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    zero=st.sampled_from(["none", "subtract"]),
    scale_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    clip=st.booleans(),
    narrow=st.booleans(),
    rows=st.integers(1, 5),
    exponent=st.integers(-9, 4),
    seed=st.integers(0, 99),
)
def test_fake_quantize_is_dequantize(
    bits, strategy, zero, scale_dtype, dtype, clip, narrow, rows, exponent, seed
):
    w = (weight(rows, 48, seed) * 10.0**exponent).to(dtype)
    s = spec(bits, strategy, 16, zero, scale_dtype)
    options = {"narrow": narrow}
    if clip:
        options["clip_max"] = torch.rand(s.scale_shape(rows, 48)) * 10.0**exponent
    q = quantize(w, s, **options)
    assert q.scales.shape == s.scale_shape(rows, 48) and q.scales.dtype == scale_dtype
    assert (q.scales != 0).all() and q.scales.isfinite().all()
    assert int(q.codes.max()) < 2**bits
    assert torch.equal(fake_quantize(w, s, **options), q.dequantize(dtype))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("zero", ["none", "subtract"])
def test_error_is_at_most_half_a_step(bits, zero):
    w, s = weight(), spec(bits, zero=zero)
    q = quantize(w, s, narrow=True)
    steps = (q.dequantize() - w).abs() / q.scales.repeat_interleave(16, 1)
    assert steps.max() <= (0.5 if zero == "none" else 1.0) + 1e-4
    assert steps.mean() < 0.3


def test_the_extreme_of_a_symmetric_group_lies_on_the_lowest_code():
    w = weight()
    groups = w.view(24, 4, 16)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    q = quantize(w, spec(4))
    assert torch.equal(q.scales, -extreme / 8)
    assert (q.codes.view(24, 4, 16).min(-1).values == 0).all()
    assert (extreme > 0).any() and (extreme < 0).any()
    narrow, _ = int_grid(w, spec(4), narrow=True)
    assert torch.equal(narrow, extreme.abs() / 7)


def test_negative_scales_beat_narrow_grids():
    w = weight(64, 512)
    for bits, gain in ((3, 1.2), (4, 1.1)):
        error = [
            (quantize(w, spec(bits), narrow=n).dequantize() - w).square().mean()
            for n in (True, False)
        ]
        assert error[0] > gain * error[1]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_codes_are_chosen_with_the_scale_as_stored(scale_dtype):
    w, s = weight(), spec(4, scale_dtype=scale_dtype)
    q = quantize(w, s)
    stored = q.scales.float().repeat_interleave(16, 1)
    assert torch.equal(q.codes, (torch.round(w / stored) + 8).clamp(0, 15).to(torch.uint8))


@pytest.mark.parametrize("zero", ["none", "subtract"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_and_tiny_groups(zero, scale_dtype, bits):
    w = weight(3, 32)
    w[0], w[1, :16] = 0, 1e-30
    q = quantize(w, spec(bits, zero=zero, scale_dtype=scale_dtype))
    assert (q.scales != 0).all()
    out = q.dequantize()
    assert (out[0] == 0).all() and (out[1, :16] == 0).all()


def test_huge_weights_keep_finite_scales():
    q = quantize(weight() * 1e7, spec(8, zero="subtract", scale_dtype=torch.float16))
    assert q.scales.isfinite().all() and q.dequantize().isfinite().all()


@pytest.mark.parametrize("zero", ["none", "subtract"])
def test_bounds_clamp_the_weight(zero):
    w, s = weight(), spec(4, zero=zero)
    bound = w.view(24, 4, 16).abs().amax(-1) * 0.6
    clamped = w.view(24, 4, 16).clamp(-bound[..., None], bound[..., None]).view(24, 64)
    assert torch.equal(fake_quantize(w, s, clip_max=bound), fake_quantize(clamped, s))


def test_strided_weights():
    w = weight(64, 24).t()
    for zero in ("none", "subtract"):
        assert torch.equal(
            fake_quantize(w, spec(4, zero=zero)), fake_quantize(w.contiguous(), spec(4, zero=zero))
        )


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(InputError, match="groups of 128"):
        quantize(weight(), spec(4, group_size=128))
    with pytest.raises(InputError, match="block"):
        quantize(weight(), QuantSpec("int", 4, "block", block=(8, 8)))
    with pytest.raises(InputError, match="no arithmetic"):
        quantize(weight(), QuantSpec("int", 4, "group", 16, second="tensor"))


@pytest.mark.parametrize("zero", ["none", "subtract"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [16, None])
def test_fewer_passes_round_to_the_same_values(zero, bits, size):
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(bits))
    w[0], w[1], w[2, 3] = 0, w[1].abs(), 50
    s = QuantSpec("int", bits, "group" if size else "channel", size, zero=zero)
    absmax = w.view(32, -1, size or 64).abs().amax(-1)
    for bound in (None, absmax, absmax * 0.7, absmax * 0.01):
        want = fake_quantize_int(w, s, clip_max=bound, from_range=True)
        assert torch.equal(nearest_int(w, s, out=torch.empty_like(w), clip_max=bound), want)
        scaled = w.clone()
        assert torch.equal(nearest_int(scaled, s, out=scaled, clip_max=bound), want)
