"""FP8, NVFP4 and QoQ's weights: grids, bounds, saturation, and codes on a grid already chosen."""

import pytest
import torch

from compressor.errors import InputError
from compressor.ir.qtensor import (
    E2M1_VALUES,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantSpec,
    decode_elements,
    spread,
)
from compressor.ir.scheme import ActivationSpec
from compressor.numerics import fake_quantize, nearest_codes, quantize
from compressor.numerics.activations import fake_quantize_activation
from compressor.numerics.nvfp4 import (
    e2m1_codes,
    full_range,
    quantize_nvfp4,
    round_e2m1,
    shared_absmax,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
I8 = torch.int8
FP8 = {
    "tensor": QuantSpec("fp8_e4m3", 8, "tensor", scale_dtype=BF16),
    "channel": QuantSpec("fp8_e4m3", 8, "channel", scale_dtype=F16),
    "group": QuantSpec("fp8_e4m3", 8, "group", 32),
    "block": QuantSpec("fp8_e4m3", 8, "block", block=(128, 128), scale_dtype=BF16),
}
QOQ = {
    "offset": QuantSpec("int", 4, "group", 32, zero="offset", scale_dtype=I8, second="channel"),
    "subtract": QuantSpec("int", 4, "group", 32, zero="subtract", scale_dtype=I8, second="channel"),
    "channel": QuantSpec("int", 4, "channel", zero="offset", scale_dtype=F16),
}
INTS = {
    "int4": QuantSpec("int", 4, "group", 32, scale_dtype=BF16),
    "int3": QuantSpec("int", 3, "group", 32, zero="subtract", scale_dtype=F16),
    "int8": QuantSpec("int", 8, "channel", scale_dtype=BF16),
}
ALL = {**FP8, **QOQ, **INTS, "nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp8": MXFP8}


def weight(rows=70, columns=160, *, seed=0, dtype=F32):
    """Channels of very different magnitude, and one row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w *= torch.exp2(torch.randint(-9, 3, (rows, 1), generator=generator).float())
    w[3] = 0
    return w.to(dtype)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_quantizing_is_the_nearest_code_on_its_own_grid(name, dtype):
    spec, w = ALL[name], weight(dtype=dtype)
    q = quantize(w, spec)
    assert q.spec == spec and q.scales.shape == spec.scale_shape(*w.shape)
    assert q.scales.dtype == spec.scale_dtype and bool(q.dequantize().isfinite().all())
    assert torch.equal(q.dequantize()[3], torch.zeros(160)) or name == "int3"
    grids = [t if t is None else spread(t.float(), spec, q.shape) for t in (q.scales, q.zeros)]
    grids = [t if t is None else t.expand(q.shape) for t in grids]
    second = None if q.second is None else q.second.expand(w.shape[0], 1)
    codes = nearest_codes(w, spec, scales=grids[0], zeros=grids[1], second=second)
    assert torch.equal(codes, q.codes)
    for column in (0, 33, 159):
        one = nearest_codes(
            w[:, column],
            spec,
            scales=grids[0][:, column],
            zeros=None if grids[1] is None else grids[1][:, column],
            second=None if second is None else second[:, 0],
        )
        assert torch.equal(one, q.codes[:, column]), column
    assert torch.equal(fake_quantize(w, spec), q.dequantize(dtype))


@pytest.mark.parametrize("name", ALL)
def test_every_weight_gets_its_nearest_value(name):
    """Against every value of the grid in float64; a zero point may be chosen off the range."""
    spec, w = ALL[name], weight(seed=1)
    q = quantize(w, spec)
    bits = torch.arange(2**spec.bits, dtype=torch.uint8)
    values = decode_elements(bits, spec, torch.float64)
    values = values[values.isfinite()]
    scales = spread(q.scales.double(), spec, q.shape).expand(q.shape)[..., None]
    if q.zeros is None:
        grid = values * scales
    else:
        zeros = spread(q.zeros.double(), spec, q.shape).expand(q.shape)[..., None]
        grid = values * scales - zeros if spec.zero == "offset" else (values - zeros) * scales
    if q.second is not None:
        grid = grid * q.second.double()[..., None]
    nearest = (grid - w.double()[..., None]).abs().amin(-1)
    made = (q.dequantize(torch.float64) - w.double()).abs()
    assert bool((made <= nearest * (1 + 1e-4) + w.abs().amax() * 1e-7).all())


@pytest.mark.parametrize("name", ["offset", "subtract"])
def test_no_progressive_value_leaves_eight_bits(name):
    """All pairs of a group's ends on the int8 level, from all-negative to all-positive ranges."""
    bound = 120 if name == "offset" else 119
    ends = torch.linspace(-bound, bound, 61)
    low, high = torch.meshgrid(ends, ends, indexing="ij")
    low, high = torch.minimum(low, high).flatten(), torch.maximum(low, high).flatten()
    steps = torch.linspace(0, 1, 30)
    groups = low[:, None] + (high - low)[:, None] * steps
    full = torch.full((groups.shape[0], 2), float(bound))
    full[:, 1] = -bound
    w = torch.cat([groups, low[:, None], high[:, None], full.repeat(1, 16)], dim=1)
    q = quantize(w, QOQ[name])
    values = q.dequantize(torch.float64) / q.second.double()
    assert values.min() >= -128 and values.max() <= 127
    assert bool((values == values.round()).all())
    assert q.scales.min() >= 1 and q.scales.max() <= 17


@pytest.mark.parametrize("name", ["offset", "subtract", "channel", "nvfp4", "group"])
def test_bounds_clamp_the_weight_first(name):
    spec = ALL[name]
    w = weight(32, 64, seed=2)
    size = {"channel": 64, "nvfp4": 16}.get(name, 32)
    bound = w.abs().view(32, -1, size).amax(-1) * 0.7
    spread_bound = bound.repeat_interleave(size, 1)
    clamped = torch.minimum(torch.maximum(w, -spread_bound), spread_bound)
    amax = {"amax": shared_absmax([w])} if name == "nvfp4" else {}
    q = quantize(w, spec, clip_max=bound, **amax)
    other = quantize(clamped, spec, **amax)
    assert torch.equal(q.dequantize(), other.dequantize())
    assert not torch.equal(q.dequantize(), quantize(w, spec, **amax).dequantize())


@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (5, 7), (1, 129)])
def test_fp8_blocks_at_the_edges(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    q = quantize(w, FP8["block"])
    for r in range(0, shape[0], 128):
        for c in range(0, shape[1], 128):
            part = w[r : r + 128, c : c + 128]
            scale = (part.abs().max() / 448).to(BF16)
            assert q.scales[r // 128, c // 128] == scale
            expected = (part / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            assert torch.equal(q.dequantize()[r : r + 128, c : c + 128], expected * scale.float())


def test_a_scale_that_was_rounded_down_saturates():
    w = torch.full((1, 32), 448 * (1 + 2**-9))  # its scale rounds to 1
    q = quantize(w, FP8["tensor"])
    assert float(q.scales) == 1 and torch.equal(q.dequantize(), torch.full((1, 32), 448.0))


def test_e2m1_rounds_to_nearest_and_ties_to_even_codes():
    table = torch.tensor(E2M1_VALUES)
    x = torch.linspace(-9, 9, 7201, dtype=torch.float64).float()
    values = round_e2m1(x)
    errors = (x.abs()[:, None] - table).abs()
    assert torch.equal((values.abs() - x.abs()).abs(), errors.amin(1))
    middles = (table[1:] + table[:-1]) / 2
    assert e2m1_codes(round_e2m1(middles)).tolist() == [0, 2, 2, 4, 4, 6, 6]
    signed = torch.tensor([-0.0, 0.0, -0.1, 0.1, -7.0, 1e30])
    assert e2m1_codes(round_e2m1(signed)).tolist() == [0, 0, 8, 0, 15, 7]
    codes = torch.arange(16, dtype=torch.uint8)
    decoded = decode_elements(codes, NVFP4, F32)
    assert torch.equal(e2m1_codes(decoded), codes)


def test_four_over_six_never_makes_its_own_error_worse():
    w = weight(seed=5)
    blocks = w.view(w.shape[0], -1, 16)
    errors = {}
    for rule in ("mse", "mae", "abs_max"):
        delta = quantize_nvfp4(w, rule=rule).dequantize().view(blocks.shape) - blocks
        errors[rule] = {
            "mse": delta.square().sum(-1),
            "mae": delta.abs().sum(-1),
            "abs_max": delta.abs().amax(-1),
        }
    for rule in errors:
        for other in errors:
            assert bool((errors[rule][rule] <= errors[other][rule] * (1 + 1e-5)).all())
    plain = quantize_nvfp4(w).dequantize().view(blocks.shape) - blocks
    assert errors["mse"]["mse"].sum() < plain.square().sum()


def test_fused_linears_share_a_global_scale():
    parts = [weight(16, 64, seed=6), weight(8, 64, seed=7) * 40, weight(8, 64, seed=8)]
    amax = shared_absmax(parts)
    assert float(amax) == float(max(p.abs().max() for p in parts))
    whole = quantize_nvfp4(torch.cat(parts), rule="mse")
    apart = [quantize_nvfp4(p, rule="mse", amax=amax) for p in parts]
    assert all(torch.equal(q.second, whole.second) for q in apart)
    assert torch.equal(torch.cat([q.codes for q in apart]), whole.codes)
    scales = torch.cat([q.scales.view(torch.uint8) for q in apart])
    assert torch.equal(scales, whole.scales.view(torch.uint8))


def test_values_beyond_a_given_absmax_saturate():
    w = weight(16, 64, seed=9)
    for rule in ("static_6", "static_4", "mse"):
        q = quantize_nvfp4(w, rule=rule, amax=w.abs().max() / 10)
        assert bool(q.dequantize().isfinite().all())
        top = float(448 * 6 * q.second)
        assert float(q.dequantize().abs().max()) <= top * (1 + 1e-6)


@pytest.mark.parametrize("rows", [16, 40, 1])
def test_sixteen_rows_share_a_scale(rows):
    w = torch.randn(rows, 48, generator=torch.Generator().manual_seed(10))
    for rule in ("static_6", "mse"):
        q = quantize_nvfp4(w, rule=rule, tile_rows=16)
        raw = q.scales.view(torch.uint8)
        for row in range(rows):
            assert torch.equal(raw[row], raw[row // 16 * 16])
    square = torch.randn(32, 32, generator=torch.Generator().manual_seed(11))
    there = quantize_nvfp4(square, rule="mae", tile_rows=16).dequantize()
    back = quantize_nvfp4(square.t().contiguous(), rule="mae", tile_rows=16).dequantize()
    assert torch.equal(there, back.t())


def test_chunks_of_rows_change_nothing(monkeypatch):
    w = weight(64, 32, seed=12)
    whole = quantize_nvfp4(w, rule="mse", tile_rows=16)
    monkeypatch.setattr(
        "compressor.numerics.nvfp4.row_chunks",
        lambda weight, multiple: [slice(r, r + multiple) for r in range(0, 64, multiple)],
    )
    parts = quantize_nvfp4(w, rule="mse", tile_rows=16)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.dequantize(), whole.dequantize())


def test_ranges_of_the_rules():
    assert [full_range(r) for r in ("static_6", "static_4", "mse")] == [2688, 1792, 1536]


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 3e38])
def test_extreme_magnitudes_stay_finite(magnitude):
    w = torch.full((2, 32), magnitude)
    for spec in (NVFP4, FP8["channel"], FP8["block"], QOQ["offset"], QOQ["channel"]):
        q = quantize(w, spec)
        assert bool(q.dequantize(torch.float64).isfinite().all()), spec


def test_nvfp4_inputs_are_plain_blocks_under_one_global_scale():
    x = weight(24, 64, seed=13).view(2, 12, 64)
    local = ActivationSpec("fp4_e2m1", "local", 16)
    scale = x.abs().max() / 2688
    made = fake_quantize_activation(x, local, scale)
    expected = quantize_nvfp4(x.view(24, 64), amax=scale * 2688).dequantize()
    assert made.dtype == x.dtype and torch.equal(made, expected.view(x.shape))
    dynamic = ActivationSpec("fp4_e2m1", "tensor")
    rows = [quantize_nvfp4(row).dequantize() for row in x]
    assert torch.equal(fake_quantize_activation(x, dynamic), torch.stack(rows))
    half = fake_quantize_activation(x.bfloat16(), dynamic)
    assert half.dtype == BF16
    with pytest.raises(InputError, match="global scale"):
        fake_quantize_activation(x, local)
    with pytest.raises(InputError, match="token"):
        fake_quantize_activation(x, ActivationSpec("fp4_e2m1", "token"))


def test_a_static_int8_scale_reaches_the_lowest_code():
    x = torch.tensor([[-3.0, -1.28, 1.28, 0.004]])
    spec = ActivationSpec("int8", "static")
    made = fake_quantize_activation(x, spec, torch.tensor([0.01]))
    torch.testing.assert_close(made, torch.tensor([[-1.28, -1.28, 1.27, 0.0]]))


def test_what_is_not_possible_is_refused():
    w = weight(4, 40)
    with pytest.raises(InputError, match="blocks of 16"):
        quantize(w, NVFP4)
    with pytest.raises(InputError, match="groups of 32"):
        quantize(w, FP8["group"])
    with pytest.raises(InputError, match="groups of 32"):
        quantize(w, QOQ["offset"])
    with pytest.raises(InputError, match="QoQ"):
        quantize(w, QuantSpec("int", 4, "channel", zero="offset", scale_dtype=BF16))
    with pytest.raises(InputError, match="no arithmetic"):
        quantize(w, QuantSpec("fp8_e4m3", 8, "channel", second="channel"))
    bad = weight(4, 64)
    bad[1, 1] = torch.nan
    for spec in (NVFP4, FP8["channel"]):
        with pytest.raises(InputError, match="NaN"):
            quantize(bad, spec)


@pytest.mark.parametrize("spec", [MXFP4, MXFP8])
def test_rules_of_microscaling_exponents(spec):
    largest = {MXFP4: 6.0, MXFP8: 448.0}[spec]
    w = weight(64, 64, seed=9)
    w[5], w[6], w[7], w[8] = 3e38, 1e-41, -0.0, largest
    made = {rule: quantize(w, spec, rule=rule) for rule in ("floor", "ceil", "nearest", "mse")}
    errors, top = {}, {}
    for rule, q in made.items():
        values = q.dequantize(torch.float64)
        assert bool(q.dequantize(torch.bfloat16).isfinite().all())
        errors[rule] = (values - w.double()).view(64, 2, 32).square().sum(-1)
        top[rule] = w.double().view(64, 2, 32).abs().amax(-1) / q.scales.double()
        assert bool((q.dequantize()[7] == 0).all()) and bool((q.scales[7].view(I8) == 0).all())
        assert torch.equal(q.dequantize()[8], w[8])
    usual = torch.arange(64) != 5  # whose exponent ends where bfloat16 does
    assert bool((top["ceil"][usual] <= largest).all())
    assert bool((errors["mse"] <= torch.minimum(errors["floor"], errors["ceil"])).all())
    assert (made["floor"].scales.float() <= made["nearest"].scales.float()).all()
    usual[8] = False  # 1.75 exactly, which compressed-tensors rounds up for E4M3 too
    assert (made["nearest"].scales.float() <= made["ceil"].scales.float())[usual].all()


def test_microscaled_inputs_are_those_of_compressed_tensors_rule():
    x = weight(6, 96, seed=3).view(2, 3, 96)
    for element, spec in (("fp4_e2m1", MXFP4), ("fp8_e4m3", MXFP8)):
        seen = fake_quantize_activation(x, ActivationSpec(element, "mx", 32))
        expected = quantize(x.view(6, 96), spec, rule="nearest").dequantize().view(x.shape)
        assert torch.equal(seen, expected)
    with pytest.raises(InputError, match="groups of 32"):
        fake_quantize_activation(x[..., :40], ActivationSpec("fp4_e2m1", "mx", 32))
