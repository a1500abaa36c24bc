"""Decoding over quantized caches against float64, and the cache's own rounding."""

import pytest
import torch
from compressor_kernels.attention.quantized_cache import (
    DecodeTiles,
    dequantize_kv4,
    kv4_decode,
    kv4_decode_ref,
    kv8_decode,
    kv8_decode_ref,
    quantize_kv4,
    quantize_kv8,
)

from compressor.ir.scheme import KVSpec
from compressor.numerics.activations import fake_quantize_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
CODES = [torch.int8, torch.float8_e4m3fn]


def problem(batch, heads, groups, tokens, dim, dtype, *, seed=0):
    """q, k and v; keys with a channel that stands out, as they have."""
    generator = torch.Generator().manual_seed(seed + tokens + dim)
    q = torch.randn(batch, heads, 1, dim, generator=generator)
    k, v = (torch.randn(batch, groups, tokens, dim, generator=generator) for _ in range(2))
    k[..., 3] += 4
    return [x.to(dtype).to(DEVICE) for x in (q, k, v)]


def kv8(q, k, v, dtype, *, per_head):
    """Arguments of `kv8_decode`."""
    shared = (0, 2, 3) if per_head else (0, 1, 2, 3)
    largest = 127 if dtype == torch.int8 else 448
    scales = [x.float().abs().amax(shared) / largest for x in (k, v)]
    codes = [quantize_kv8(x, s, dtype=dtype) for x, s in zip((k, v), scales, strict=True)]
    return (q, *codes), {"k_scale": scales[0], "v_scale": scales[1]}


def kv4(q, k, v):
    """Arguments of `kv4_decode`."""
    (k, k_params), (v, v_params) = quantize_kv4(k), quantize_kv4(v)
    return (q, k, v), {"k_params": k_params, "v_params": v_params}


def assert_close(out, exact):
    """Weights and outputs are rounded once each."""
    rounding = 2 * torch.finfo(out.dtype).eps
    assert (out.double() - exact.double()).norm() <= rounding * exact.double().norm()


SHAPES = [(2, 4, 2, 150, 64), (1, 8, 1, 70, 128), (3, 3, 3, 1, 32), (1, 6, 2, 77, 80)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kv8(shape, codes, dtype):
    arguments, scales = kv8(*problem(*shape, dtype), codes, per_head=shape[0] > 1)
    out = kv8_decode(*arguments, **scales)
    assert out.dtype == dtype and out.shape == arguments[0].shape
    assert_close(out, kv8_decode_ref(*arguments, **scales))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kv4(shape, dtype):
    arguments, params = kv4(*problem(*shape, dtype))
    out = kv4_decode(*arguments, **params)
    assert out.dtype == dtype and out.shape == arguments[0].shape
    assert_close(out, kv4_decode_ref(*arguments, **params))


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_past_the_length_are_not_read(bits):
    q, k, v = problem(3, 4, 2, 200, 64, torch.float16)
    lengths = torch.tensor([200, 1, 131], dtype=torch.int32, device=DEVICE)
    options = {"lengths": lengths, "scale": 0.2}
    if bits == 8:
        arguments, scales = kv8(q, k, v, torch.float8_e4m3fn, per_head=True)
        for codes in arguments[1:]:
            codes.view(torch.uint8)[1, :, 1:] = 0x7F  # NaN
            codes.view(torch.uint8)[2, :, 131:] = 0x7F
        out, ref = kv8_decode, kv8_decode_ref
    else:
        arguments, scales = kv4(q, k, v)
        for params in scales.values():
            params[1, :, 1:] = float("nan")
            params[2, :, 131:] = float("nan")
        out, ref = kv4_decode, kv4_decode_ref
    out, exact = (f(*arguments, **scales, **options) for f in (out, ref))
    assert out.isfinite().all()
    assert_close(out, exact)


@pytest.mark.parametrize("tiles", [DecodeTiles(64, 4, 2, 1), DecodeTiles(128, 4, 2, 64)])
def test_splits_agree(tiles):
    arguments, params = kv4(*problem(1, 4, 2, 500, 64, torch.float16))
    out = kv4_decode(*arguments, **params, tiles=tiles)
    assert_close(out, kv4_decode_ref(*arguments, **params))
    assert torch.equal(out, kv4_decode(*arguments, **params, tiles=tiles))


def test_four_bits_are_those_that_are_evaluated():
    """fake_quantize_kv is what perplexities are measured with."""
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(3)) + 0.7
    x[0, 0, 0] = 2.5  # all equal
    packed, params = quantize_kv4(x)
    assert packed.shape == (2, 3, 50, 32) and params.shape == (2, 3, 50, 2)
    expected = fake_quantize_kv(x, KVSpec("int4", "token_head"))
    assert torch.equal(dequantize_kv4(packed, params), expected)


@pytest.mark.parametrize("codes, element", list(zip(CODES, ["int8", "fp8_e4m3"], strict=True)))
def test_eight_bits_are_those_that_are_evaluated(codes, element):
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor([0.01, 0.02, 0.03])
    decoded = quantize_kv8(x, scale, dtype=codes).float() * scale.reshape(1, 3, 1, 1)
    assert torch.equal(decoded, fake_quantize_kv(x, KVSpec(element, "head"), scale))


def test_empty():
    (q, k, v), params = kv4(*problem(2, 4, 2, 5, 32, torch.float16))
    halves = {n: p[:0] for n, p in params.items()}
    assert kv4_decode(q[:0], k[:0], v[:0], **halves).shape == (0, 4, 1, 32)


def test_refuses_what_does_not_fit():
    q, k, v = problem(2, 4, 2, 20, 32, torch.float16)
    (_, k8, v8), scales = kv8(q, k, v, torch.int8, per_head=False)
    (_, k4, v4), params = kv4(q, k, v)
    lengths = torch.ones(2, dtype=torch.int64)
    for bad, options in (
        ((q, k, v), scales),
        ((q[:, :3], k8, v8), scales),
        ((q.float(), k8, v8), scales),
        ((q.repeat(1, 1, 2, 1), k8, v8), scales),
        ((q, k8, v8[:, :, :5]), scales),
        ((q, k8, v8), {**scales, "k_scale": torch.ones(3)}),
        ((q, k8, v8), {**scales, "lengths": lengths}),
        ((q, k8, v8), {**scales, "scale": 0.0}),
    ):
        with pytest.raises(ValueError):
            kv8_decode(*bad, **options)
    for bad, options in (
        ((q, k8, v8), params),
        ((q, k4[..., :8], v4[..., :8]), params),
        ((q, k4, v4), {**params, "v_params": params["v_params"].float()}),
    ):
        with pytest.raises(ValueError):
            kv4_decode(*bad, **options)
    with pytest.raises(ValueError):
        quantize_kv4(k[..., :5])
    with pytest.raises(ValueError):
        quantize_kv8(k, torch.ones(5), dtype=torch.int8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype):
    q, k, v = problem(4, 32, 8, 8192, 128, dtype)
    for codes in CODES:
        arguments, scales = kv8(q, k, v, codes, per_head=True)
        assert_close(kv8_decode(*arguments, **scales), kv8_decode_ref(*arguments, **scales))
    arguments, params = kv4(q, k, v)
    assert_close(kv4_decode(*arguments, **params), kv4_decode_ref(*arguments, **params))
