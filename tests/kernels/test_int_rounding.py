"""Groups rounded in one pass, against the plain reference and the quantizer it stands for."""

import pytest
import torch
from compressor_kernels.search.int_rounding import (
    group_values,
    round_groups,
    round_groups_ref,
    rounding_errors,
    rounding_errors_ref,
)

from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.methods.awq import finish
from compressor.numerics import int_affine
from compressor.numerics.awq_clip import search_clip_gram
from compressor.numerics.int_affine import quantize_int

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INPUTS = torch.randn(200, 96, generator=torch.Generator().manual_seed(9))
GRAM = INPUTS.T @ INPUTS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(rows=24, columns=96, size=32, seed=0, dtype=torch.float32):
    """Weights some groups of which are of one sign, tiny, huge, or zero."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    groups = weight.view(rows, -1, size)
    groups[0, 0] = groups[0, 0].abs()
    groups[1, 1] = -groups[1, 1].abs() - 3
    groups[2, 0] *= 1e-6
    groups[3, 2] *= 3e4
    groups[4, 1] = 0
    return weight.to(DEVICE, dtype)


def bounds_of(weight, size):
    largest = weight.float().view(len(weight), -1, size).abs().amax(-1)
    share = torch.rand(largest.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return largest * (0.6 + 0.4 * share)


def ways(weight, size):
    """Options: the range alone, clipped, clipped with some groups on symmetric grids."""
    bounds = bounds_of(weight, size)
    signed = torch.rand(bounds.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE) < 0.4
    yield {}
    yield {"from_range": True}
    yield {"bounds": bounds, "from_range": True}
    yield {"bounds": bounds, "from_range": True, "signed": signed}


def equal(found, wanted):
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "size", "stored"),
    [
        *((4, 32, stored) for stored in DTYPES),
        (2, 32, torch.bfloat16),
        (8, 24, torch.float16),
        (3, 96, torch.float32),
    ],
)
def test_the_same_bits_as_the_reference(bits, size, symmetric, stored):
    weight = drawn(size=size if size == 32 else 32)
    form = {"bits": bits, "group_size": size, "symmetric": symmetric, "stored": stored}
    for way in ways(weight, size):
        if not symmetric or "signed" not in way:
            assert equal(
                round_groups(weight, **form, **way), round_groups_ref(weight, **form, **way)
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_any_float(dtype):
    weight = drawn(dtype=dtype)
    form = {"bits": 4, "group_size": 32, "symmetric": False, "stored": torch.float16}
    assert equal(round_groups(weight, **form), round_groups_ref(weight, **form))


@pytest.mark.gpu
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_bits_as_in_many_steps(symmetric, stored, monkeypatch):
    size, weight = 128, drawn(4096, 11008, 128)
    zero = "none" if symmetric else "subtract"
    spec = QuantSpec("int", 4, "group", size, zero=zero, scale_dtype=stored)
    for way in ways(weight, size):
        options = {"clip_max" if n == "bounds" else n: value for n, value in way.items()}
        if symmetric:
            options.pop("signed", None)
        fused = quantize_int(weight, spec, **options)
        with monkeypatch.context() as patch:
            patch.setattr("compressor.numerics.int_affine.LARGEST", 0)
            many = quantize_int(weight, spec, **options)
        parts = [(q.codes, q.scales, q.zeros) for q in (fused, many)]
        assert equal(*parts), (way.keys(), (fused.codes != many.codes).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("each", [None, False, True])
def test_errors(symmetric, each):
    stack = torch.stack([drawn(), drawn(seed=1), drawn(seed=2)])
    form = {"bits": 4, "group_size": 32}
    made = round_groups(stack.flatten(0, 1), **form, symmetric=symmetric, stored=torch.bfloat16)
    by = None
    if each is not None:
        by = torch.rand((3, 96) if each else (96,), generator=torch.Generator().manual_seed(5))
        by = (by + 0.5).to(DEVICE)
    found = rounding_errors(stack, *made, **form, by=by)
    wanted = rounding_errors_ref(stack, *made, **form, by=by)
    if DEVICE == "cuda":
        assert equal(found, wanted)
        return
    for a, b in zip(found, wanted, strict=True):  # the interpreter cuts bits off
        assert torch.allclose(a.float(), b.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("size", [1, 20, 32, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_codes_stand_for(symmetric, size, stored, dtype, monkeypatch):
    zero = "none" if symmetric else "subtract"
    spec = QuantSpec("int", 5, "group", size, zero=zero, scale_dtype=stored)
    q = quantize_int(torch.randn(7, 480 if size == 20 else 96).to(DEVICE), spec)
    found = group_values(q.codes, q.scales, q.zeros, bits=5, dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(QTensor, "_in_one_pass", lambda *_: False)
        wanted = q.dequantize(dtype)
    assert found.dtype == dtype
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts bits off
        assert torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, wanted) and torch.equal(q.dequantize(dtype), wanted)


def test_what_does_not_fit_is_refused():
    form = {"bits": 4, "symmetric": True, "stored": torch.float16}
    with pytest.raises(ValueError, match="do not divide"):
        round_groups(torch.zeros(2, 48), group_size=32, **form)
    with pytest.raises(ValueError, match="bounds"):
        round_groups(torch.zeros(2, 64), group_size=32, bounds=torch.zeros(2, 1), **form)
    q = round_groups(torch.zeros(2, 64, device=DEVICE), group_size=32, **form)
    with pytest.raises(ValueError, match="do not fit"):
        rounding_errors(torch.zeros(1, 4, 64, device=DEVICE), *q, bits=4, group_size=32)
    with pytest.raises(ValueError, match="do not fit"):
        group_values(q[0][:1], *q[1:], bits=4, dtype=torch.float32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_awq_rounds_is_the_same_through_it(symmetric, monkeypatch):
    zero = "none" if symmetric else "subtract"
    spec = QuantSpec("int", 4, "group", 32, zero=zero, scale_dtype=torch.bfloat16)
    stack = torch.stack([drawn(), drawn(seed=1)])
    options = search_clip_gram(stack, GRAM.to(DEVICE), spec).options()
    by = torch.rand(96, generator=torch.Generator().manual_seed(5)).to(DEVICE) + 0.5
    found = []
    for fused in (False, True):
        for module in (int_affine, finish):
            monkeypatch.setattr(module, "rounded_at_once", lambda *_, fused=fused: fused)
        q = quantize_int(stack.flatten(0, 1), spec, **options)
        found.append((q, finish.errors_of(stack, q, by, GRAM.to(DEVICE))))
    (q, error), (other, rival) = found
    assert (q.codes != other.codes).float().mean() < 1e-3  # x / 15, and x times 1 / 15
    assert torch.allclose(error, rival, rtol=2e-2)
