"""Products with packed int4 weights against float64, over every layout the format allows."""

import itertools

import pytest
import torch
from compressor_kernels.linear.w4a16 import (
    DecodeTiles,
    Int4Weight,
    TiledTiles,
    w4a16,
    w4a16_dequantize,
    w4a16_ref,
)

from tests.support.products import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16]


def pack(codes):
    """[R, C] codes to int32 [R, ceil(C/8)], word by word as the format's text says."""
    rows, columns = codes.shape
    words = torch.zeros(rows, -(-columns // 8), dtype=torch.int64)
    for c in range(columns):
        words[:, c // 8] |= codes[:, c] << (4 * (c % 8))
    return (words - (words >> 31 << 32)).to(torch.int32)  # the sign bit is nibble 7's highest


def problem(count, outputs, inner, group, dtype, *, zeros, seed=0):
    """x, packed, scales and zeros, and the weight in float64."""
    generator = torch.Generator().manual_seed(seed + 7 * outputs + inner)
    groups = 1 if group is None else inner // group
    codes = torch.randint(0, 16, (outputs, inner), generator=generator)
    points = torch.full((outputs, groups), 8)
    if zeros:
        points = torch.randint(0, 16, (outputs, groups), generator=generator)
    scales = (torch.rand(outputs, groups, generator=generator) * 0.05 + 0.01).to(dtype)
    x = torch.randn(count, inner, generator=generator).to(dtype)
    each = torch.arange(inner) // (group or inner)
    weight = (codes - points[:, each]).double() * scales.double()[:, each]
    packed_zeros = pack(points.mT).mT.contiguous().to(DEVICE) if zeros else None
    tensors = (x.to(DEVICE), pack(codes).to(DEVICE), scales.to(DEVICE), packed_zeros)
    return tensors, weight.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256, None])
def test_decode(group, zeros, dtype):
    tensors, weight = problem(3, 44, 1024, group, dtype, zeros=zeros)
    y = w4a16(*tensors, group_size=group)
    assert y.dtype == dtype
    assert_close(y, tensors[0], weight, rounded_weight=group in (32, 64))


@pytest.mark.parametrize("count", [1, 2, 7, 11, 16])
@pytest.mark.parametrize(
    "outputs, inner, group", [(5, 576, 64), (33, 96, 32), (17, 640, 128), (9, 20, None)]
)
def test_decode_of_odd_shapes(outputs, inner, group, count):
    tensors, weight = problem(count, outputs, inner, group, torch.float16, zeros=True)
    bias = torch.randn(outputs, dtype=torch.float16).to(DEVICE)
    y = w4a16(*tensors, group_size=group, bias=bias)
    assert_close(y, tensors[0], weight, bias=bias.double(), rounded_weight=group in (32, 64))


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("zeros", [False, True])
def test_inputs_of_one_sign_lose_nothing(zeros, count):
    """Codes are multiplied as they are, and zero points taken off the sum of inputs: what cancels
    must not have grown much larger than the result."""
    (x, *weights), weight = problem(count, 40, 1024, 128, torch.float16, zeros=zeros)
    y = w4a16(x.abs(), *weights, group_size=128, out_dtype=torch.float32)
    assert_close(y, x.abs(), weight)


@pytest.mark.parametrize(
    "block_n, slices, split", [(16, 2, 1), (32, 4, 2), (16, 2, 4), (64, 4, 3), (64, 2, 8)]
)
@pytest.mark.parametrize("group", [64, 128])
def test_decode_tiles_agree(group, block_n, slices, split):
    tensors, weight = problem(5, 40, 1408, group, torch.float16, zeros=True)
    bias = torch.randn(40).to(DEVICE)
    tiles = DecodeTiles(block_n=block_n, slices=slices, split=split, num_warps=slices)
    y = w4a16(*tensors, group_size=group, bias=bias, out_dtype=torch.float32, tiles=tiles)
    assert_close(y, tensors[0], weight, bias=bias.double(), rounded_weight=group == 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "count, inner, group, split",
    [(1, 1408, 128, 1), (2, 2048, 256, 2), (3, 2304, 128, 3), (8, 600, None, 1), (1, 256, 64, 1)],
)
def test_decode_with_zero_points_after_the_last_step(count, inner, group, split, dtype):
    tensors, weight = problem(count, 43, inner, group, dtype, zeros=True)
    bias = torch.randn(43).to(DEVICE)
    tiles = DecodeTiles(block_n=16, slices=4, split=split, apart=True)
    y = w4a16(*tensors, group_size=group, bias=bias, out_dtype=torch.float32, tiles=tiles)
    assert_close(y, tensors[0], weight, bias=bias.double(), rounded_weight=group == 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("inner, group, split", [(2432, 128, 2), (2048, 256, 1), (700, None, 1)])
def test_decode_of_one_token_by_eight_warps(inner, group, split, zeros, dtype):
    """Wider steps than those of the tiles that are chosen."""
    tensors, weight = problem(1, 75, inner, group, dtype, zeros=zeros)
    tiles = DecodeTiles(32, 8, split, num_warps=8, num_stages=3, apart=True)
    y = w4a16(*tensors, group_size=group, tiles=tiles)
    assert_close(y, tensors[0], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("inner, group", [(512, 64), (384, 128), (96, 32), (200, None)])
def test_tiled(inner, group, zeros, dtype):
    tensors, weight = problem(37, 70, inner, group, dtype, zeros=zeros)
    bias = torch.randn(70).to(dtype).to(DEVICE)
    for split in (1, 2):
        tiles = TiledTiles(block_n=64, block_m=32, split=split)
        y = w4a16(*tensors, group_size=group, bias=bias, tiles=tiles)
        rounded = group in (32, 64)
        assert_close(y, tensors[0], weight, bias=bias.double(), rounded_weight=rounded)


@pytest.mark.parametrize("count", [20, 300])
def test_many_tokens(count):
    tensors, weight = problem(count, 24, 256, 128, torch.float16, zeros=True)
    bias = torch.randn(24, dtype=torch.float16).to(DEVICE)
    y = w4a16(*tensors, group_size=128, bias=bias)
    assert_close(y, tensors[0], weight, bias=bias.double(), rounded_weight=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    "outputs, inner, group", [(20, 1280, 128), (7, 576, 64), (3, 32, 32), (11, 20, None)]
)
def test_dequantize(outputs, inner, group, zeros, dtype):
    tensors, weight = problem(1, outputs, inner, group, dtype, zeros=zeros)
    dense = w4a16_dequantize(*tensors[1:], in_features=inner, group_size=group)
    assert dense.dtype == dtype and dense.shape == (outputs, inner)
    if DEVICE == "cuda":  # the interpreter truncates bf16 stores
        assert torch.equal(dense, weight.to(dtype))
    assert ((dense.double() - weight).abs() <= torch.finfo(dtype).eps * weight.abs()).all()
    packed = Int4Weight(*tensors[1:], in_features=inner, group_size=group)
    assert torch.equal(packed.dequantize(torch.float64), weight)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 128, None])
def test_a_tile_is_that_part_of_the_weight(group, zeros):
    tensors, weight = problem(1, 43, 384, group, torch.float16, zeros=zeros)
    packed = Int4Weight(*tensors[1:], in_features=384, group_size=group)
    rows, columns = slice(8, 40), slice(128, 384) if group else slice(None)
    assert torch.equal(packed.tile(rows, columns).dequantize(torch.float64), weight[rows, columns])


def test_reference_is_the_product_with_the_weight():
    (x, *weights), weight = problem(4, 13, 128, 32, torch.bfloat16, zeros=True)
    bias = torch.randn(13, dtype=torch.float64).to(DEVICE)
    y = w4a16_ref(x.double(), *weights, group_size=32, bias=bias)
    assert torch.allclose(y, x.double() @ weight.mT + bias, rtol=1e-12, atol=1e-12)


def test_leading_dimensions_and_strides():
    (x, *weights), weight = problem(6, 16, 256, 128, torch.float16, zeros=False)
    wide = torch.stack((x, x), dim=1).view(3, 2, 2, 256)[:, :, 0]
    y = w4a16(wide, *weights, group_size=128)
    assert y.shape == (3, 2, 16)
    assert_close(y.view(6, 16), x, weight)
    assert w4a16(x[:0], *weights, group_size=128).shape == (0, 16)


def test_a_nan_scale_spoils_its_output_alone():
    tensors, _ = problem(2, 19, 256, 128, torch.float16, zeros=True)
    tensors[2][7, 1] = float("nan")
    bad = w4a16(*tensors, group_size=128).isnan()
    assert bad[:, 7].all() and bad.sum() == 2


def test_refuses_tensors_that_do_not_fit():
    (x, packed, scales, zeros), _ = problem(2, 16, 256, 64, torch.float16, zeros=True)
    for arguments, group in (
        ((x, packed[:, :-1], scales, zeros), 64),
        ((x, packed.to(torch.int64), scales, zeros), 64),
        ((x, packed, scales[:, :-1], zeros), 64),
        ((x, packed, scales, zeros[:, :-1]), 64),
        ((x, packed, scales, zeros), 48),
        ((x, packed, scales, zeros), None),
        ((x.float(), packed, scales, zeros), 64),
    ):
        with pytest.raises(ValueError):
            w4a16(*arguments, group_size=group)
    with pytest.raises(ValueError):
        w4a16(x, packed, scales, zeros, group_size=64, bias=torch.zeros(15))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "outputs, inner, group, zeros, dtype",
    [
        (14336, 4096, 128, True, torch.float16),
        (14336, 4096, 128, False, torch.bfloat16),
        (4096, 14336, 128, True, torch.bfloat16),
        (4096, 14336, 64, False, torch.float16),
        (4096, 11008, 128, True, torch.float16),
        (576, 1536, 32, True, torch.float16),
        (576, 1536, 64, True, torch.bfloat16),
        (576, 1536, None, True, torch.float16),
        (576, 1536, None, False, torch.bfloat16),
    ],
)
def test_real_shapes(outputs, inner, group, zeros, dtype):
    tensors, weight = problem(1000, outputs, inner, group, dtype, zeros=zeros)
    for count in (1, 5, 16, 64, 1000):
        x = tensors[0][:count]
        y = w4a16(x, *tensors[1:], group_size=group)
        assert_close(y, x, weight, rounded_weight=count > 16 or group in (32, 64))
        assert torch.equal(y, w4a16(x, *tensors[1:], group_size=group))


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("outputs, inner", [(4096, 14336), (4096, 11008), (4096, 4096)])
def test_tiles_of_one_token_at_real_shapes(outputs, inner, zeros):
    tensors, weight = problem(1, outputs, inner, 128, torch.float16, zeros=zeros)
    shared = [(4, 4), (4, 2), (4, 1), (8, 2), (8, 1)]
    for (slices, split), apart in itertools.product(shared, (False, True)):
        tiles = DecodeTiles(32, slices, split, num_warps=slices, num_stages=3, apart=apart)
        y = w4a16(*tensors, group_size=128, tiles=tiles)
        assert_close(y, tensors[0], weight)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("size", [4096, 8192])
@pytest.mark.parametrize("plain_between", [False, True])
def test_kernels_see_what_those_right_before_them_wrote(count, size, plain_between):
    """A kernel may start before the last one has ended: it must still wait for its inputs, and for
    weights that were written a moment ago."""
    (x, packed, scales, zeros), _ = problem(count, size, size, 128, torch.float16, zeros=True)
    others = [packed.roll(i, 0) for i in range(4)]
    shrink = 15 * (size / 4096) ** 0.5
    scale = scales / shrink

    def chain(wait):
        y, weight = x, packed.clone()
        for i in range(24):
            if plain_between:
                weight.copy_(others[i % 4])
                scale.copy_(scales.roll(i, 0) / shrink)
                wait()
            y = w4a16(y, weight, scale, zeros, group_size=128)
            wait()
        return y

    apart = chain(torch.cuda.synchronize)
    assert apart.isfinite().all() and apart.any()
    for _ in range(5):
        assert torch.equal(chain(lambda: None), apart)
