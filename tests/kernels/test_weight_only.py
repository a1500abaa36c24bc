"""Products with weights of any width against float64, from streams packed bit by bit here."""

import pytest
import torch
from compressor_kernels.linear.weight_only import weight_only, weight_only_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn


def pack(codes, bits):
    """[R, C] codes to int32 [R, ceil(C*bits/32)], one Python integer a row."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (place * bits) for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
        rows.append([word - (word >> 31 << 32) for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def problem(count, outputs, inner, *, bits, block, zeros="none", dtype=torch.bfloat16, seed=0):
    """Operands of `weight_only` and the weight in float64; bits None for E4M3."""
    generator = torch.Generator().manual_seed(seed + 7 * outputs + inner + (bits or 0))
    x = torch.randn(count, inner, generator=generator).to(dtype)
    rows, columns = block
    down, across = torch.arange(outputs) // rows, torch.arange(inner) // columns
    shape = (-(-outputs // rows), -(-inner // columns))
    scales = (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(dtype)
    if bits is None:
        codes = torch.randn(outputs, inner, generator=generator).mul(50).clamp(-448, 448).to(FP8)
        values, packed, stored = codes.double(), codes, None
    else:
        codes = torch.randint(0, 2**bits, (outputs, inner), generator=generator)
        points, stored = torch.full(shape, 2 ** (bits - 1)), None
        if zeros == "each":
            points = torch.randint(0, 2**bits, shape, generator=generator)
            stored = pack(points.t(), bits).t().contiguous().to(DEVICE)
        elif zeros == "one":
            points = points - 1
            stored = torch.full((1,), -1, dtype=torch.int8, device=DEVICE)
        packed = pack(codes, bits)
        values = codes.double() - points[down][:, across].double()
    weight = values * scales.double()[down][:, across]
    operands = (x.to(DEVICE), packed.to(DEVICE), scales.to(DEVICE), stored)
    return operands, weight.to(DEVICE)


def assert_close(y, x, weight, *, bias=0.0, rounded):
    """As exact as fp32 sums, or as weights rounded to x's dtype before them."""
    expected = x.double() @ weight.mT + bias
    magnitudes = x.double().abs() @ weight.abs().mT + 1e-30
    loss = torch.finfo(x.dtype).eps if rounded else 1e-5
    step = torch.finfo(y.dtype).eps
    assert ((y.double() - expected).abs() <= step * expected.abs() + loss * magnitudes).all()


def check(count, outputs, inner, *, bits, block, zeros="none", dtype=torch.bfloat16, bias=None):
    operands, weight = problem(
        count, outputs, inner, bits=bits, block=block, zeros=zeros, dtype=dtype
    )
    options = {"bits": bits or 8, "block": block, "bias": bias, "out_dtype": torch.float32}
    added = 0.0 if bias is None else bias.double()
    y = weight_only(*operands, **options)
    assert_close(y, operands[0], weight, bias=added, rounded=block[1] < inner)
    x = operands[0].double()
    exact = weight_only_ref(x, *operands[1:], **{**options, "out_dtype": torch.float64})
    assert torch.allclose(exact, x @ weight.mT + added, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zeros", ["none", "each"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits, zeros):
    check(3, 37, 96, bits=bits, block=(1, 32), zeros=zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 8, None])
@pytest.mark.parametrize("outputs, inner", [(5, 20), (70, 200), (1, 1)])
def test_a_scale_for_each_row_is_exact(outputs, inner, bits, dtype):
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    check(2, outputs, inner, bits=bits, block=(1, inner), dtype=dtype, bias=bias)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("zeros", ["none", "one"])
def test_one_scale_for_all(zeros, bits):
    operands, weight = problem(4, 33, 60, bits=bits, block=(33, 60), zeros=zeros)
    y = weight_only(*operands, bits=bits, out_dtype=torch.float32)
    assert_close(y, operands[0], weight, rounded=False)


@pytest.mark.parametrize("bits, block", [(None, (128, 128)), (None, (1, 40)), (3, (1, 24))])
def test_blocks_and_odd_groups(bits, block):
    check(17, 200, 240, bits=bits, block=block)


@pytest.mark.parametrize("bits, zeros", [(3, "each"), (8, "none"), (None, "none")])
def test_leading_shape_and_no_tokens(bits, zeros):
    operands, weight = problem(6, 9, 64, bits=bits, block=(1, 32), zeros=zeros)
    x = operands[0].view(2, 3, 64)
    y = weight_only(x, *operands[1:], bits=bits or 8, block=(1, 32))
    assert y.shape == (2, 3, 9) and y.dtype == x.dtype
    assert_close(y.view(6, 9), operands[0], weight, rounded=True)
    assert weight_only(x[:0], *operands[1:], bits=bits or 8, block=(1, 32)).shape == (0, 3, 9)


def test_what_does_not_fit():
    (x, codes, scales, zeros), _ = problem(2, 8, 64, bits=3, block=(1, 32), zeros="each")
    for words in (
        lambda: weight_only(x.float(), codes, scales, bits=3, block=(1, 32)),
        lambda: weight_only(x, codes, scales, bits=4, block=(1, 32)),
        lambda: weight_only(x, codes, scales, bits=9, block=(1, 32)),
        lambda: weight_only(x, codes, scales, bits=3, block=(1, 16)),
        lambda: weight_only(x, codes, scales, zeros[:, :1], bits=3, block=(1, 32)),
        lambda: weight_only(x, codes, scales, bits=3, block=(1, 32), bias=x[0, :3]),
        lambda: weight_only(x, codes.float(), scales, bits=3),
    ):
        with pytest.raises(ValueError):
            words()


@pytest.mark.gpu
@pytest.mark.parametrize("bits, block", [(8, (1, 4096)), (3, (1, 128)), (None, (1, 4096))])
@pytest.mark.parametrize("count", [1, 33])
def test_real_shapes(count, bits, block):
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    outputs, inner = 14336, 4096
    x = torch.randn(count, inner, generator=generator, device=DEVICE).bfloat16()
    shape = (outputs, inner // block[1])
    scales = torch.rand(shape, generator=generator, device=DEVICE) * 0.01 + 0.001
    if bits is None:
        codes = torch.randn(outputs, inner, generator=generator, device=DEVICE).to(FP8)
    else:
        span = (outputs, inner * bits // 32)
        codes = torch.randint(-(2**31), 2**31 - 1, span, generator=generator, device=DEVICE)
        codes = codes.to(torch.int32)
    options = {"bits": bits or 8, "block": block}
    y = weight_only(x, codes, scales, **options, out_dtype=torch.float32)
    want = weight_only_ref(x.double(), codes, scales, **options)
    assert (y.double() - want).norm() / want.norm() < (1e-5 if block[1] == inner else 3e-3)
