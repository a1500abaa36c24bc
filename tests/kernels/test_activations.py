"""Tokens rounded to int8 and fp8, to the bit of the plain version."""

import pytest
import torch
from compressor_kernels.inputs.activations import quantize_tokens, quantize_tokens_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODES = [torch.int8, torch.float8_e4m3fn]
INPUTS = [torch.float16, torch.bfloat16, torch.float32]


def tokens(*shape, dtype, seed=0):
    """Magnitudes over many binades, one token of zeros, one with an outlier."""
    generator = torch.Generator().manual_seed(seed + shape[-1])
    x = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()
    x.view(-1, shape[-1])[0] = 0
    x.view(-1, shape[-1])[1 % x.view(-1, shape[-1]).shape[0], 0] = 300
    return x.to(dtype).to(DEVICE)


def assert_same(x, **options):
    codes, scales = quantize_tokens(x, **options)
    expected_codes, expected_scales = quantize_tokens_ref(x, **options)
    assert codes.dtype == options["dtype"] and scales.dtype == torch.float32
    assert torch.equal(scales, expected_scales)
    # -0 and 0 are one value; the bytes of every other are compared as they are.
    same = codes.view(torch.uint8) == expected_codes.view(torch.uint8)
    assert (same | ((codes.float() == 0) & (expected_codes.float() == 0))).all()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("shape", [(5, 576), (3, 33), (2, 3, 4096), (1, 1), (2, 5000)])
def test_tokens(shape, inputs, dtype):
    assert_same(tokens(*shape, dtype=inputs), dtype=dtype)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("group", [16, 48, 128])
def test_groups(group, dtype):
    x = tokens(7, 384, dtype=torch.bfloat16)
    assert quantize_tokens(x, dtype=dtype, group_size=group)[1].shape == (7, 384 // group)
    assert_same(x, dtype=dtype, group_size=group)


@pytest.mark.parametrize("dtype", CODES)
def test_a_given_scale_saturates(dtype):
    x = tokens(4, 300, dtype=torch.float16)
    scale = torch.tensor([0.013], device=DEVICE)
    assert_same(x, dtype=dtype, scale=scale)
    codes, same = quantize_tokens(x, dtype=dtype, scale=scale)
    largest = 127 if dtype == torch.int8 else 448
    assert same is scale and codes.float().max() == largest


@pytest.mark.parametrize("dtype", CODES)
def test_ties_go_to_even(dtype):
    # absmax 127 or 448: the scale is one, and halves stay halves
    largest = 127.0 if dtype == torch.int8 else 448.0
    x = torch.tensor([[largest, 0.5, 1.5, 2.5, -0.5, -1.5, 9.5, 17.0, 19.0, 0.0009765625]])
    assert_same(x.to(DEVICE), dtype=dtype)
    if dtype == torch.int8:
        codes, _ = quantize_tokens(x.to(DEVICE), dtype=dtype)
        assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, 10, 17, 19, 0]


@pytest.mark.parametrize("dtype", CODES)
def test_vanishing_tokens_stay_finite(dtype):
    x = torch.tensor([[1e-40, -3e-41, 0.0], [2e-38, 1e-38, -3e-39]], device=DEVICE)
    codes, scales = quantize_tokens(x, dtype=dtype)
    assert (scales > 0).all() and codes.float().isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", CODES)
def test_what_is_not_finite_shows_in_the_scale(dtype, bad):
    x = tokens(3, 64, dtype=torch.float16)
    x[1, 5] = bad
    _, scales = quantize_tokens(x, dtype=dtype)
    assert not scales[1].isfinite() and scales[[0, 2]].isfinite().all()


def test_empty_and_strided():
    x = tokens(4, 128, dtype=torch.float16)
    codes, scales = quantize_tokens(x[:0], dtype=torch.int8)
    assert codes.shape == (0, 128) and scales.shape == (0, 1)
    assert_same(x[::2, ::2], dtype=torch.int8)


def test_refuses_what_does_not_fit():
    x = tokens(2, 64, dtype=torch.float16)
    one = torch.ones(1, device=DEVICE)
    for options in (
        {"dtype": torch.uint8},
        {"dtype": torch.int8, "group_size": 48},
        {"dtype": torch.int8, "scale": one.half()},
        {"dtype": torch.int8, "scale": torch.ones(2, device=DEVICE)},
        {"dtype": torch.int8, "scale": one, "group_size": 32},
    ):
        with pytest.raises(ValueError):
            quantize_tokens(x, **options)
    with pytest.raises(ValueError):
        quantize_tokens(x.to(torch.int32), dtype=torch.int8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(2048, 4096), (777, 14336), (64, 28672), (3, 65536)])
def test_real_shapes(shape, dtype):
    assert_same(tokens(*shape, dtype=torch.bfloat16), dtype=dtype)
