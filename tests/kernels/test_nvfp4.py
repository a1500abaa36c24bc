"""Products with NVFP4 weights against float64, and every code under every scale."""

import pytest
import torch
from compressor_kernels.linear.nvfp4 import (
    VALUES,
    NVFP4Weight,
    nvfp4_dequantize,
    nvfp4_matmul,
    nvfp4_matmul_ref,
)
from compressor_kernels.linear.w4a16 import DecodeTiles, TiledTiles

from tests.support.products import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
E4M3 = torch.float8_e4m3fn


def problem(count, outputs, inner, dtype, *, seed=0):
    """x, packed, scales and second, and the weight in float64."""
    generator = torch.Generator().manual_seed(seed + 7 * outputs + inner)
    codes = torch.randint(0, 16, (outputs, inner), generator=generator)
    scales = (torch.rand(outputs, inner // 16, generator=generator) * 448).to(E4M3)
    second = torch.tensor([3e-5])
    x = torch.randn(count, inner, generator=generator).to(dtype)
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float64)
    weight = table[codes] * scales.double().repeat_interleave(16, 1) * second.double()
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return [t.to(DEVICE) for t in (x, packed, scales, second)], weight.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 11])
@pytest.mark.parametrize("outputs, inner", [(5, 576), (33, 96), (44, 1024), (9, 16)])
def test_decode(outputs, inner, count, dtype):
    tensors, weight = problem(count, outputs, inner, dtype)
    bias = torch.randn(outputs, dtype=dtype).to(DEVICE)
    y = nvfp4_matmul(*tensors, bias=bias)
    assert y.dtype == dtype
    assert_close(y, tensors[0], weight, bias=bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [512, 208])
def test_tiles_agree(inner, dtype):
    tensors, weight = problem(21, 40, inner, dtype)
    bias = torch.randn(40).to(DEVICE)
    for tiles in (
        TiledTiles(block_n=64, block_m=32),
        TiledTiles(block_n=64, block_m=32, split=2),
        DecodeTiles(block_n=32, slices=4, split=2),
    ):
        y = nvfp4_matmul(*tensors, bias=bias, out_dtype=torch.float32, tiles=tiles)
        assert_close(y, tensors[0], weight, bias=bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_every_scale(dtype):
    """16 codes x 256 scales are exact, the smallest included; NaN scales spoil their block."""
    codes = torch.arange(16)
    packed = (codes[::2] | codes[1::2] << 4).to(torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).view(E4M3)
    one = torch.ones(1)
    tensors = [t.to(DEVICE) for t in (packed, scales, one)]
    exact = NVFP4Weight(*tensors).dequantize(torch.float64)
    x = torch.eye(16, dtype=dtype, device=DEVICE)
    y = nvfp4_matmul(x, *tensors, out_dtype=torch.float32).mT.double()
    bad = scales.float().isnan().flatten().to(DEVICE)
    assert torch.equal(y[~bad], exact[~bad]) and y[bad].isnan().all()
    dense = nvfp4_dequantize(*tensors, dtype=dtype).double()
    assert torch.equal(dense[~bad], exact[~bad]) and dense[bad].isnan().all()


@pytest.mark.parametrize("count", [20, 300])
def test_many_tokens(count):
    tensors, weight = problem(count, 24, 256, torch.float16)
    bias = torch.randn(24, dtype=torch.float16).to(DEVICE)
    y = nvfp4_matmul(*tensors, bias=bias)
    assert_close(y, tensors[0], weight, bias=bias.double(), rounded_weight=count > 256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype):
    tensors, weight = problem(1, 20, 1280, dtype)
    dense = nvfp4_dequantize(*tensors[1:], dtype=dtype)
    if DEVICE == "cuda":  # the interpreter truncates bf16 stores
        assert torch.equal(dense, weight.float().to(dtype))
    smallest = torch.finfo(dtype).smallest_normal
    bound = torch.finfo(dtype).eps * weight.abs().clamp(min=smallest)
    assert ((dense.double() - weight).abs() <= bound).all()
    packed = NVFP4Weight(*tensors[1:])
    assert torch.allclose(packed.dequantize(torch.float64), weight)
    part = packed.tile(slice(3, 9), slice(64, 160)).dequantize(torch.float64)
    assert torch.allclose(part, weight[3:9, 64:160])


def test_reference_is_the_product_with_the_weight():
    (x, *weights), weight = problem(4, 13, 128, torch.bfloat16)
    bias = torch.randn(13, dtype=torch.float64).to(DEVICE)
    y = nvfp4_matmul_ref(x.double(), *weights, bias=bias)
    assert torch.allclose(y, x.double() @ weight.mT + bias, rtol=1e-12, atol=1e-12)


def test_leading_dimensions_and_strides():
    (x, *weights), weight = problem(6, 16, 256, torch.float16)
    wide = torch.stack((x, x), dim=1).view(3, 2, 2, 256)[:, :, 0]
    y = nvfp4_matmul(wide, *weights)
    assert y.shape == (3, 2, 16)
    assert_close(y.view(6, 16), x, weight)
    assert nvfp4_matmul(x[:0], *weights).shape == (0, 16)


def test_refuses_tensors_that_do_not_fit():
    (x, packed, scales, second), _ = problem(2, 16, 256, torch.float16)
    for arguments in (
        (x, packed[:, :-1], scales, second),
        (x, packed.to(torch.int32), scales, second),
        (x, packed, scales[:, :-1], second),
        (x, packed, scales.half(), second),
        (x, packed, scales, second.half()),
        (x, packed, scales, second.repeat(2)),
        (x.float(), packed, scales, second),
        (x[:, :8], packed[:, :4], scales[:, :0], second),
    ):
        with pytest.raises(ValueError):
            nvfp4_matmul(*arguments)
    with pytest.raises(ValueError):
        nvfp4_matmul(x, packed, scales, second, bias=torch.zeros(15))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs, inner", [(14336, 4096), (576, 1536)])
def test_real_shapes(outputs, inner, dtype):
    (x, *weights), weight = problem(1000, outputs, inner, dtype)
    for count in (1, 16, 64, 1000):
        y = nvfp4_matmul(x[:count], *weights)
        assert_close(y, x[:count], weight, rounded_weight=count > 256)
        assert torch.equal(y, nvfp4_matmul(x[:count], *weights))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "block_n, slices, stages", [(16, 4, 3), (32, 4, 3), (16, 2, 4), (16, 8, 3)]
)
def test_tiles_of_one_token_at_real_shapes(block_n, slices, stages):
    (x, *weights), weight = problem(1, 4096, 14336, torch.float16)
    tiles = DecodeTiles(block_n, slices, num_warps=slices, num_stages=stages)
    assert_close(nvfp4_matmul(x, *weights, tiles=tiles), x, weight)
