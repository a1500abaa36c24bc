"""Products with QServe's tiles against float64 and against the format's own reader."""

import pytest
import torch
from compressor_kernels.linear.w4a8 import (
    DecodeTiles,
    QServeWeight,
    TiledTiles,
    w4a8,
    w4a8_ref,
)

from compressor.formats.qserve.codec import FORMAT, INPUT
from compressor.numerics.progressive import quantize_offset, quantize_progressive
from tests.support.low_bit_cases import qoq

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def stored(outputs, inner, group, *, zero="offset", seed=0):
    """The tensors that the format writes for a random weight, and what they stand for in fp64."""
    generator = torch.Generator().manual_seed(seed + outputs + inner)
    weight = torch.randn(outputs, inner, generator=generator) * 0.02 + 0.005
    spec = qoq(group, zero)
    q = quantize_progressive(weight, spec) if group else quantize_offset(weight, spec)
    tensors = FORMAT.encode(q, model_dtype=torch.float16, input=INPUT)
    return {n: t.to(DEVICE) for n, t in tensors.items()}, q.dequantize(torch.float64).to(DEVICE)


def inputs(count, inner, *, seed=1):
    generator = torch.Generator().manual_seed(seed + count)
    a = torch.randint(-127, 128, (count, inner), generator=generator, dtype=torch.int8)
    return a.to(DEVICE), (torch.rand(count, generator=generator) * 0.02 + 0.001).to(DEVICE)


def assert_close(y, a, scales, weight, *, bias=0.0):
    """Exact but for fp32 sums over groups and one rounding."""
    exact = (a.double() @ weight.mT) * scales.double().reshape(-1, 1) + bias
    magnitudes = (a.double().abs() @ weight.abs().mT) * scales.double().reshape(-1, 1)
    step = torch.finfo(y.dtype).eps  # the interpreter truncates bf16 stores
    assert ((y.double() - exact).abs() <= step * exact.abs() + 1e-5 * magnitudes).all()


@pytest.mark.parametrize("zero", ["offset", "subtract"])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_reference_is_what_the_format_reads(group, zero):
    tensors, weight = stored(96, 512, group, zero=zero)
    packed = QServeWeight(**tensors)
    assert torch.equal(packed.dequantize(), weight)
    rows, columns = slice(32, 64), slice(0, weight.shape[1] // 2 // 32 * 32)
    assert torch.equal(packed.tile(rows, columns).dequantize(), weight[rows, columns])


def test_reference_of_channels_is_what_the_format_reads():
    tensors, weight = stored(64, 96, None)
    packed = QServeWeight(**tensors)
    assert torch.equal(packed.dequantize(), weight)
    rows, columns = slice(32, 64), slice(0, weight.shape[1] // 2 // 32 * 32)
    assert torch.equal(packed.tile(rows, columns).dequantize(), weight[rows, columns])


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize(
    "outputs, inner, group",
    [(64, 512, 128), (96, 640, 128), (32, 96, 32), (96, 192, 64), (64, 512, 256), (64, 160, None)],
)
def test_decode(outputs, inner, group, count):
    tensors, weight = stored(outputs, inner, group)
    a, scales = inputs(count, inner)
    bias = torch.randn(outputs).to(DEVICE)
    y = w4a8(a, **tensors, row_scales=scales, bias=bias)
    assert y.dtype == torch.float16
    assert_close(y, a, scales, weight, bias=bias.double())


@pytest.mark.parametrize("group", [128, None])
def test_tiles_agree(group):
    tensors, weight = stored(96, 640, group)
    a, scales = inputs(21, 640)
    bias = torch.randn(96).to(DEVICE)
    for tiles in (
        DecodeTiles(block_n=32, slices=2),
        DecodeTiles(block_n=64, slices=4, split=2),
        TiledTiles(block_n=128, block_m=32),
        TiledTiles(block_n=128, block_m=16),
    ):
        options = {"row_scales": scales, "bias": bias, "out_dtype": torch.float32}
        y = w4a8(a, **tensors, **options, tiles=tiles)
        assert_close(y, a, scales, weight, bias=bias.double())


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs, inner, group", [(160, 192, 64), (128, 256, 128), (64, 96, None)])
def test_many_tokens(outputs, inner, group, out):
    tensors, weight = stored(outputs, inner, group)
    a, _ = inputs(70, inner)
    one = torch.tensor([0.03], device=DEVICE)
    y = w4a8(a.view(7, 10, inner), **tensors, row_scales=one, out_dtype=out)
    assert y.shape == (7, 10, outputs)
    assert_close(y.view(70, outputs), a, one, weight)


def test_reference_is_the_product_with_the_weight():
    tensors, weight = stored(64, 256, 128)
    a, scales = inputs(5, 256)
    y = w4a8_ref(a, **tensors, row_scales=scales, out_dtype=torch.float32)
    assert torch.allclose(y.double(), (a.double() @ weight.mT) * scales.double()[:, None])


def test_the_largest_level_two_does_not_overflow():
    """No file of ours holds them, but the layout does."""
    tensors, _ = stored(32, 128, 128)
    tensors["s2_scales"].fill_(127)
    tensors["s2_zeros"].fill_(-128)
    tensors["qweight"].fill_(-1)  # code 15 everywhere
    a = torch.full((2, 128), 127, dtype=torch.int8, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    y = w4a8(a, **tensors, row_scales=one, out_dtype=torch.float32)
    sums = (15 * 127 - 128) * 127 * 128
    assert torch.allclose(y.double(), sums * tensors["s1_scales"].double().expand(2, 32))


def test_empty():
    tensors, _ = stored(32, 64, 64)
    a, _ = inputs(3, 64)
    one = torch.ones(1, device=DEVICE)
    assert w4a8(a[:0], **tensors, row_scales=one).shape == (0, 32)


def test_refuses_tensors_that_do_not_fit():
    tensors, _ = stored(64, 256, 128)
    a, scales = inputs(4, 256)
    for change in (
        {"qweight": tensors["qweight"][:, :-1]},
        {"qweight": tensors["qweight"].view(torch.uint8)},
        {"s1_scales": tensors["s1_scales"][:5]},
        {"s2_scales": tensors["s2_scales"][:1]},
        {"s2_zeros": None},
        {"s1_szeros": tensors["s1_scales"]},
        {"row_scales": scales[:2]},
        {"bias": torch.zeros(3)},
        {"out_dtype": torch.int32},
    ):
        with pytest.raises(ValueError):
            w4a8(a, **{**tensors, "row_scales": scales, **change})
    with pytest.raises(ValueError):
        w4a8(a.float(), **tensors, row_scales=scales)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "outputs, inner, group",
    [(14336, 4096, 128), (4096, 4096, None), (576, 1536, 64), (576, 1536, 128)],
)
def test_real_shapes(outputs, inner, group):
    tensors, weight = stored(outputs, inner, group)
    for count in (1, 16, 300):
        a, scales = inputs(count, inner)
        y = w4a8(a, **tensors, row_scales=scales)
        assert_close(y, a, scales, weight)
        assert torch.equal(y, w4a8(a, **tensors, row_scales=scales))
