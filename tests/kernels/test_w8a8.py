"""Products of 8-bit codes against float64, with every form of scale the formats store."""

import pytest
import torch
from compressor_kernels.linear.w8a8 import (
    ProductTiles,
    w8a8,
    w8a8_blocks,
    w8a8_blocks_ref,
    w8a8_ref,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8, FP8 = torch.int8, torch.float8_e4m3fn
SMALL = ProductTiles(64, 64, 64, num_warps=4, num_stages=2)


def codes(rows, inner, dtype, generator):
    if dtype == INT8:
        made = torch.randint(-128, 128, (rows, inner), generator=generator).to(INT8)
    else:
        made = (torch.randn(rows, inner, generator=generator) * 60).clamp(-448, 448).to(FP8)
    return made.to(DEVICE)


def problem(count, outputs, inner, dtype, *, seed=0):
    """a, W, row scales, column scales and a bias."""
    generator = torch.Generator().manual_seed(seed + outputs + 3 * inner)
    scales = [
        (torch.rand(n, generator=generator) * 0.02 + 0.001).to(DEVICE) for n in (count, outputs)
    ]
    bias = torch.randn(outputs, generator=generator).to(DEVICE)
    made = (codes(n, inner, dtype, generator) for n in (count, outputs))
    return (*made, *scales, bias)


def assert_close(y, exact, *, dtype=INT8, fast=False):
    """One rounding of the output, beside what tensor cores lose of sums of E4M3 products."""
    # Their sums keep 13 bits below the largest term; the interpreter truncates bf16 stores.
    loss = 1e-6 if dtype == INT8 or DEVICE == "cpu" else (2e-3 if fast else 1e-3)
    bound = torch.finfo(y.dtype).eps * exact.abs() + loss * exact.norm(dim=-1, keepdim=True)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("count, outputs, inner", [(5, 70, 64), (65, 33, 200), (1, 3, 7)])
def test_product(count, outputs, inner, dtype, out):
    a, w, rows, columns, bias = problem(count, outputs, inner, dtype)
    options = {"row_scales": rows, "column_scales": columns, "bias": bias}
    y = w8a8(a, w, **options, out_dtype=out, tiles=SMALL)
    assert y.dtype == out
    exact = (a.double() * rows.double()[:, None]) @ (w.double() * columns.double()[:, None]).mT
    exact = exact + bias.double()
    assert_close(y, exact, dtype=dtype)
    ours = w8a8_ref(a, w, **options, out_dtype=torch.float32)
    assert torch.allclose(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("fast", [False, True])
def test_one_scale_for_all(dtype, fast):
    a, w, rows, columns, _ = problem(20, 48, 96, dtype)
    scales = {"row_scales": rows[:1], "column_scales": columns[:1].bfloat16().reshape(1, 1)}
    y = w8a8(a.view(4, 5, 96), w, **scales, fast=fast, out_dtype=torch.float32)
    assert y.shape == (4, 5, 48)
    exact = w8a8_ref(a, w, **scales, out_dtype=torch.float32).double()
    assert_close(y.view(20, 48), exact, dtype=dtype, fast=fast)


def test_int8_sums_are_exact():
    a, w, *_ = problem(3, 40, 4096, INT8)
    one = torch.ones(1, device=DEVICE)
    y = w8a8(a, w, row_scales=one, column_scales=one, out_dtype=torch.float32)
    sums = (a.cpu().long() @ w.cpu().long().mT).float()
    assert torch.equal(y.cpu(), sums)


@pytest.mark.parametrize("tiles", [SMALL, ProductTiles(128, 128, 128), ProductTiles(64, 128, 256)])
def test_tiles_agree(tiles):
    a, w, rows, columns, bias = problem(130, 200, 300, INT8)
    options = {"row_scales": rows, "column_scales": columns, "bias": bias}
    y = w8a8(a, w, **options, out_dtype=torch.float32, tiles=tiles)
    assert_close(y, w8a8_ref(a, w, **options, out_dtype=torch.float32).double())


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("count, outputs, inner", [(1, 33, 200), (70, 150, 96)])
@pytest.mark.parametrize("halves", [False, True])
def test_zero_points(count, outputs, inner, one, halves):
    a, w, rows, columns, bias = problem(count, outputs, inner, INT8)
    generator = torch.Generator().manual_seed(9)
    zeros = torch.randint(-128, 128, (1 if one else outputs,), generator=generator).to(torch.int8)
    zeros = zeros.to(DEVICE)
    options = {"row_scales": rows, "column_scales": columns, "column_zeros": zeros, "bias": bias}
    tiles = ProductTiles(128, 128, 128, num_warps=4, num_stages=3, halves=halves)
    y = w8a8(a, w, **options, out_dtype=torch.float32, tiles=tiles)
    dense = (w.double() - zeros.double().reshape(-1, 1)) * columns.double().reshape(-1, 1)
    exact = (a.double() * rows.double().reshape(-1, 1)) @ dense.mT + bias.double()
    assert_close(y, exact)
    assert torch.allclose(w8a8_ref(a, w, **options, out_dtype=torch.float32).double(), exact)


@pytest.mark.parametrize("count", [1, 90, 130])
@pytest.mark.parametrize("dtype, fast", [(INT8, False), (FP8, False), (FP8, True)])
def test_halves_of_a_tile(count, dtype, fast):
    a, w, rows, columns, bias = problem(count, 200, 300, dtype)
    options = {"row_scales": rows, "column_scales": columns, "bias": bias}
    tiles = ProductTiles(128, 128, 128, num_warps=4, num_stages=3, halves=True)
    y = w8a8(a, w, **options, fast=fast, out_dtype=torch.float32, tiles=tiles)
    exact = w8a8_ref(a, w, **options, out_dtype=torch.float32).double()
    assert_close(y, exact, dtype=dtype, fast=fast)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_programs_that_stay(dtype, halves):
    count, outputs = (1500, 1700) if DEVICE == "cuda" else (300, 500)  # more tiles than programs
    a, w, rows, columns, bias = problem(count, outputs, 96, dtype)
    options = {"row_scales": rows, "column_scales": columns, "bias": bias}
    tiles = ProductTiles(128, 128, 128, num_warps=4, num_stages=3, persistent=True, halves=halves)
    y = w8a8(a, w, **options, fast=True, out_dtype=torch.float32, tiles=tiles)
    exact = w8a8_ref(a, w, **options, out_dtype=torch.float32).double()
    assert_close(y, exact, dtype=dtype, fast=True)


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("tall", [True, False])
@pytest.mark.parametrize("inputs", ["blocks", "token", "tensor"])
@pytest.mark.parametrize("count, outputs, inner", [(9, 150, 256), (3, 40, 200)])
def test_blocks(count, outputs, inner, inputs, tall, dtype):
    a, w, rows, _, bias = problem(count, outputs, inner, dtype)
    blocks = -(-inner // 128)
    generator = torch.Generator().manual_seed(5)
    height = -(-outputs // 128) if tall else outputs
    weight_scales = torch.rand(height, blocks, generator=generator).to(DEVICE) + 0.01
    per_block = torch.rand(count, blocks, generator=generator).to(DEVICE) + 0.01
    input_scales = {"blocks": per_block, "token": rows[:, None], "tensor": rows[:1]}[inputs]
    options = {"input_scales": input_scales, "weight_scales": weight_scales, "bias": bias}
    y = w8a8_blocks(a, w, **options, out_dtype=torch.float32)
    exact = w8a8_blocks_ref(a, w, **options, out_dtype=torch.float32).double()
    assert_close(y, exact, dtype=dtype)
    dense = (
        w.double()
        * weight_scales.double()
        .repeat_interleave(128 if tall else 1, 0)[:outputs]
        .repeat_interleave(128, 1)[:, :inner]
    )
    spread = input_scales.double().reshape(-1, input_scales.shape[-1])
    spread = spread.repeat_interleave(128, 1)[:, :inner] if inputs == "blocks" else spread
    assert torch.allclose(exact, (a.double() * spread) @ dense.mT + bias.double(), rtol=1e-6)


def test_a_nan_scale_spoils_its_outputs_alone():
    a, w, rows, columns, _ = problem(4, 19, 64, INT8)
    columns[7] = float("nan")
    bad = w8a8(a, w, row_scales=rows, column_scales=columns).isnan()
    assert bad[:, 7].all() and bad.sum() == 4


def test_empty_and_strided():
    a, w, rows, columns, _ = problem(6, 32, 128, INT8)
    scales = {"row_scales": rows[:3], "column_scales": columns}
    y = w8a8(a[::2], w, **scales)
    assert torch.equal(y, w8a8(a[::2].clone(), w, **scales))
    assert w8a8(a[:0], w, row_scales=rows[:1], column_scales=columns).shape == (0, 32)


def test_refuses_what_does_not_fit():
    a, w, rows, columns, bias = problem(4, 16, 128, INT8)
    scales = {"row_scales": rows, "column_scales": columns}
    for arguments, options in (
        ((a, w[:, :-1]), scales),
        ((a, w.view(FP8)), scales),
        ((a.float(), w.float()), scales),
        ((a, w), {**scales, "row_scales": rows[:2]}),
        ((a, w), {**scales, "column_scales": columns[:5]}),
        ((a, w), {**scales, "bias": bias[:3]}),
        ((a, w), {**scales, "out_dtype": torch.int32}),
    ):
        with pytest.raises(ValueError):
            w8a8(*arguments, **options)
    with pytest.raises(ValueError):
        w8a8_blocks(a, w, input_scales=rows[:, None], weight_scales=torch.ones(2, 1))
    with pytest.raises(ValueError):
        w8a8_blocks(a, w, input_scales=rows[:3, None], weight_scales=torch.ones(1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, fast", [(INT8, False), (FP8, False), (FP8, True)])
@pytest.mark.parametrize("count", [1, 100, 2048])
@pytest.mark.parametrize("outputs, inner", [(576, 1536), (8192, 8192)])
def test_real_shapes(outputs, inner, count, fast, dtype):
    a, w, rows, columns, bias = problem(count, outputs, inner, dtype)
    options = {"row_scales": rows, "column_scales": columns, "bias": bias}
    exact = w8a8_ref(a, w, **options, out_dtype=torch.float32).double()
    y = w8a8(a, w, **options, fast=fast)
    assert_close(y, exact, dtype=dtype, fast=fast)
    assert torch.equal(y, w8a8(a, w, **options, fast=fast))
    if count == 2048:
        tiles = ProductTiles(num_stages=3, persistent=True)
        y = w8a8(a, w, **options, fast=True, tiles=tiles)
        assert_close(y, exact, dtype=dtype, fast=True)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 300])
def test_real_blocks(count):
    a, w, *_, bias = problem(count, 4096, 14336, FP8)
    options = {
        "input_scales": torch.rand(count, 112, device=DEVICE),
        "weight_scales": torch.rand(32, 112, device=DEVICE),
        "bias": bias,
    }
    exact = w8a8_blocks_ref(a, w, **options, out_dtype=torch.float32).double()
    assert_close(w8a8_blocks(a, w, **options), exact, dtype=FP8)
