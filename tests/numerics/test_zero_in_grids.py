"""Asymmetric grids hold zero: no group, and least of all one of one sign, of one value, of almost
nothing or of enormous values, loses more by zero points than a symmetric grid of the same bits
does."""

import pytest
import torch
from compressor_kernels.attention.quantized_cache import dequantize_kv4, quantize_kv4
from compressor_kernels.search.awq_candidate import candidate_delta_ref
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import KVSpec
from compressor.numerics import fake_quantize, quantize
from compressor.numerics.activations import fake_quantize_kv
from compressor.numerics.gptq import gptq, inverse_factor
from compressor.numerics.grid_search import search_grid
from compressor.numerics.progressive import PROTECTIVE_RANGE

GROUP = 8
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@st.composite
def groups(draw, *, largest: float = 3e38) -> Tensor:
    """A group [GROUP] float32 of one of the kinds that a range says little about."""
    kind = draw(st.sampled_from(["positive", "negative", "constant", "zero", "tiny", "huge"]))
    unit = st.floats(0, 1, width=32)
    exponent = draw(st.integers(-20, 12))
    if kind == "constant":
        values = [draw(st.floats(-1, 1, width=32)) * 2.0**exponent] * GROUP
    elif kind == "zero":
        values = [0.0] * GROUP
    elif kind in ("tiny", "huge"):
        size = largest if kind == "huge" else draw(st.sampled_from([1e-44, 1e-38, 1e-7, 3e-6]))
        share = st.floats(0.125, 1, width=32)
        signs = st.sampled_from([-1, 0, 1])
        values = [draw(share) * draw(signs) * size for _ in range(GROUP)]
    else:
        # Whole steps of some scale lie exactly on a symmetric grid, the hardest case.
        steps = st.one_of(unit, st.integers(0, 8).map(lambda n: n / 8))
        start = draw(st.sampled_from([0.0, 0.5, 30.0]))
        values = [(start + draw(steps)) * 2.0**exponent for _ in range(GROUP)]
        values = [-v for v in values] if kind == "negative" else values
    return torch.tensor(values, dtype=F32).clamp(-largest, largest)


@st.composite
def weights(draw, **options) -> Tensor:
    return torch.stack([draw(groups(**options)) for _ in range(draw(st.integers(1, 4)))])


@st.composite
def usual_weights(draw) -> Tensor:
    """Rows of both signs, with short and long tails, about as long on either side."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = torch.randn(draw(st.integers(1, 4)), 4 * GROUP, generator=generator)
    values = values.sign() * values.abs() ** draw(st.sampled_from([0.2, 1.0, 2.0]))
    return values + draw(st.sampled_from([0.0, 0.3, -0.5]))


def error(values: Tensor, weight: Tensor) -> Tensor:
    return (values.double() - weight.double()).square().sum(-1)


def int_spec(bits: int, strategy: str, zero: str, dtype: torch.dtype) -> QuantSpec:
    size = GROUP if strategy == "group" else None
    return QuantSpec("int", bits, strategy, size, zero=zero, scale_dtype=dtype)


@settings(max_examples=300, deadline=None)
@given(
    weight=st.one_of(weights(), usual_weights()),
    bits=st.sampled_from([2, 3, 4, 8]),
    strategy=st.sampled_from(["channel", "group"]),
    dtype=st.sampled_from([F32, F16, BF16]),
    narrow=st.booleans(),
)
def test_rounding_to_nearest(weight, bits, strategy, dtype, narrow):
    specs = [int_spec(bits, strategy, zero, dtype) for zero in ("subtract", "none")]
    asymmetric, symmetric = (quantize(weight, spec, narrow=narrow) for spec in specs)
    values = asymmetric.dequantize()
    assert values.isfinite().all() and (asymmetric.scales > 0).all()
    assert (error(values, weight) <= error(symmetric.dequantize(), weight)).all()
    assert torch.equal(fake_quantize(weight, specs[0], narrow=narrow), values)


@settings(max_examples=60, deadline=None)
@given(
    weight=usual_weights(),
    bits=st.sampled_from([2, 3, 4, 8]),
    strategy=st.sampled_from(["channel", "group"]),
    seed=st.integers(0, 99),
)
def test_searched_grids(weight, bits, strategy, seed):
    diagonal = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.01
    size = weight.shape[1] if strategy == "channel" else GROUP
    errors = []
    for zero in ("subtract", "none"):
        q = search_grid(weight, diagonal, int_spec(bits, strategy, zero, F32))
        off = (q.dequantize().double() - weight.double()).square() * diagonal.double()
        errors.append(off.view(len(weight), -1, size).sum(-1))
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(group=groups(), bits=st.sampled_from([3, 4, 8]), dtype=st.sampled_from([F32, BF16]))
def test_one_scale_for_a_tensor(group, bits, dtype):
    weight = group.view(4, -1)
    made = [
        quantize(weight, int_spec(bits, "tensor", zero, dtype)).dequantize()
        for zero in ("subtract", "none")
    ]
    asymmetric, symmetric = (error(x.reshape(-1), group) for x in made)
    assert asymmetric <= symmetric


@settings(max_examples=60, deadline=None)
@given(weight=weights(), bits=st.sampled_from([3, 4, 8]), narrow=st.booleans())
def test_gptq_on_inputs_that_do_not_correlate(weight, bits, narrow):
    """Nothing is to be corrected, so its errors are those of its grids."""
    inverse = inverse_factor(torch.eye(GROUP))
    errors = []
    for zero in ("subtract", "none"):
        nearest = quantize(weight, int_spec(bits, "group", zero, F32), narrow=narrow)
        lowest = int(narrow and zero == "none")
        made = gptq([weight], [nearest], inverse, lowest=lowest)[0].q.dequantize()
        assert (error(made, weight) <= error(nearest.dequantize(), weight)).all()
        errors.append(error(nearest.dequantize(), weight))
    assert (errors[0] <= errors[1]).all()


@settings(max_examples=150, deadline=None)
@given(weight=weights(largest=1e30), bits=st.sampled_from([2, 3, 4, 8]))
def test_candidates_of_awq(weight, bits):
    """In float32, and relative to the extreme: a rounding or so of the smaller error."""
    made = [
        candidate_delta_ref(
            weight, torch.ones(GROUP), bits=bits, group_size=GROUP, symmetric=s, stored=F32
        )
        for s in (False, True)
    ]
    extreme = weight.abs().amax(-1).double().clamp(min=1e-30)
    asymmetric, symmetric = (x.double().square().sum(-1).sqrt() / extreme for x in made)
    assert (asymmetric <= symmetric * (1 + 2**-7) + 1e-6).all()


def symmetric_on_two_levels(weight: Tensor, zero: str) -> Tensor:
    """4-bit codes −8 … 7 (or mirrored) on the progressive scales' two levels."""
    bound = PROTECTIVE_RANGE[zero]
    absmax = weight.abs().amax(-1, keepdim=True)
    second = (absmax / bound).clamp(max=65504).to(F16).clamp(min=2.0**-24).float()
    second = torch.where(absmax == 0, 1.0, second)
    values = (weight / second).clamp(-bound, bound)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale = (torch.maximum(-low, high) / 8).round().clamp(1, 127)
    # Of two extremes of one magnitude the negative one has the lowest code.
    scale = torch.where(high > -low, -scale, scale)
    return (values / scale).round().clamp(-8, 7) * scale * second


@settings(max_examples=300, deadline=None)
@given(weight=weights(largest=6e4), zero=st.sampled_from(["offset", "subtract"]))
@example(weight=torch.tensor([[1.5e-6, 0, 0, 0, -1.5e-6, -7.5e-7, -7.5e-7, 1.5e-6]]), zero="offset")
def test_two_levels_of_scale(weight, zero):
    spec = QuantSpec("int", 4, "group", GROUP, zero=zero, scale_dtype=torch.int8, second="channel")
    made = quantize(weight, spec).dequantize()
    symmetric = error(symmetric_on_two_levels(weight, zero), weight)
    # What only the order of float32's operations tells apart is equal.
    slack = weight.double().square().sum(-1) * 2**-44
    one_sign = (weight >= 0).all(-1) | (weight <= 0).all(-1)
    tiny = weight.abs().amax(-1) < 1e-3
    judged = one_sign | tiny
    assert (error(made, weight) <= symmetric * (1 + 1e-6) + slack)[judged].all()


@settings(max_examples=300, deadline=None)
@given(weight=weights(largest=6e4))
@example(weight=torch.tensor([[2.0**-18] * 7 + [2.25 * 2.0**-18]]))
def test_one_float16_offset_for_a_channel(weight):
    spec = QuantSpec("int", 4, "channel", zero="offset", scale_dtype=F16)
    made = quantize(weight, spec)
    assert made.dequantize().isfinite().all()
    symmetric = quantize(weight, int_spec(4, "channel", "none", F16)).dequantize()
    one_sign = (weight >= 0).all(-1) | (weight <= 0).all(-1)
    judged = one_sign | (weight.abs().amax(-1) < 1e-4)
    slack = weight.double().square().sum(-1) * 2**-44
    worse = error(made.dequantize(), weight) > error(symmetric, weight) + slack
    assert not worse[judged].any()


@settings(max_examples=100, deadline=None)
@given(group=groups(largest=6e4))
def test_keys_and_values_keep_their_range(group):
    """An offset follows the range, so nothing is cut off: half a step, and float16's rounding of
    the step (15 of them) and of the offset."""
    made = fake_quantize_kv(group.view(1, 1, 1, -1), KVSpec("int4", "token_head")).flatten()
    packed, params = quantize_kv4(group)
    assert torch.equal(dequantize_kv4(packed, params), made)
    span, extreme = float(group.max() - group.min()), float(group.abs().max())
    bound = span / 30 + (span + extreme) * 2**-10 + 2**-20
    assert float((made - group).abs().max()) <= bound


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_row_far_from_zero_keeps_its_size(sign, bits):
    generator = torch.Generator().manual_seed(0)
    weight = sign * (0.2 + 0.1 * torch.rand(3, 64, generator=generator))
    made = quantize(weight, int_spec(bits, "channel", "subtract", F32)).dequantize()
    assert ((made - weight).abs() <= 0.3 / (2**bits - 1) / 2 + 1e-6).all()
