"""MXFP4 and MXFP8 products against float64, and rounded inputs to the bits of the reference."""

import pytest
import torch
from compressor_kernels.linear.mx import (
    DecodedTiles,
    mx_matmul,
    mx_matmul_ref,
    mx_values,
    quantize_mx_inputs,
    quantize_mx_inputs_ref,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ELEMENTS = ("fp4_e2m1", "fp8_e4m3")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def problem(count, outputs, inner, element, *, seed=0):
    """x, codes, exponents, and the weight in float64 made of them here."""
    generator = torch.Generator().manual_seed(seed + outputs + 3 * inner)
    x = torch.randn(count, inner, generator=generator).to(torch.bfloat16)
    exponents = torch.randint(110, 130, (outputs, inner // 32), generator=generator)
    if element == "fp4_e2m1":
        nibbles = torch.randint(0, 16, (outputs, inner), generator=generator)
        values = torch.tensor(E2M1 + [-v for v in E2M1]).double()[nibbles]
        codes = (nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8)
    else:
        codes = torch.randn(outputs, inner, generator=generator).mul(90).clamp(-448, 448)
        codes = codes.to(torch.float8_e4m3fn)
        values = codes.double()
    weight = values * torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    operands = (x, codes, exponents.to(torch.uint8))
    return [t.to(DEVICE) for t in operands], weight.to(DEVICE)


def assert_close(y, x, weight, bias=0.0):
    expected = x.double() @ weight.mT + bias
    magnitudes = x.double().abs() @ weight.abs().mT + 1e-30
    step = torch.finfo(y.dtype).eps
    assert ((y.double() - expected).abs() <= step * expected.abs() + 1e-5 * magnitudes).all()


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("shape", [(1, 64, 128), (5, 37, 96), (17, 130, 160), (70, 65, 32)])
def test_products(element, shape):
    (x, codes, exponents), weight = problem(*shape, element)
    bias = torch.linspace(-1, 1, shape[1], device=DEVICE)
    assert_close(mx_matmul(x, codes, exponents, out_dtype=torch.float32), x, weight)
    assert_close(mx_matmul(x, codes, exponents, bias=bias), x, weight, bias.double())
    exact = mx_matmul_ref(x.double(), codes, exponents)
    torch.testing.assert_close(exact, x.double() @ weight.mT, rtol=1e-12, atol=1e-12)
    assert torch.equal(mx_values(codes, exponents, dtype=torch.bfloat16).double(), weight)


@pytest.mark.parametrize("element", ELEMENTS)
def test_other_tiles_and_batches(element):
    (x, codes, exponents), weight = problem(24, 48, 192, element)
    tiles = DecodedTiles(block_m=32, block_n=16, block_k=64)
    y = mx_matmul(x.view(2, 12, 192), codes, exponents, out_dtype=torch.float32, tiles=tiles)
    assert_close(y.view(24, 48), x, weight)
    assert mx_matmul(x[:0], codes, exponents).shape == (0, 48)


def test_ends_of_the_exponents():
    codes = torch.full((1, 16), 0x22, dtype=torch.uint8, device=DEVICE)  # ones
    x = torch.zeros(1, 32, dtype=torch.bfloat16, device=DEVICE)
    x[0, 0] = 1
    for byte in (0, 1, 127, 252, 255):
        exponent = torch.full((1, 1), byte, dtype=torch.uint8, device=DEVICE)
        y = float(mx_matmul(x, codes, exponent, out_dtype=torch.float32))
        assert y != y if byte == 255 else y == 2.0 ** (byte - 127)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_inputs_have_the_bits_of_the_reference(element, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 41, 96, generator=generator)
    x *= torch.exp2(torch.randint(-20, 12, (3, 41, 1), generator=generator).float())
    x[0, 0], x[0, 1], x[0, 2, :32] = 0, -0.0, 1.75
    x[0, 3] = torch.linspace(-6, 6, 96)
    x[0, 4, 7] = 60000
    x = x.to(DEVICE, dtype)
    if dtype == torch.float32:
        x[0, 5], x[0, 6] = 1e-40, 3e38
    found = quantize_mx_inputs(x, element=element)
    want = quantize_mx_inputs_ref(x, element=element)
    for ours, theirs in zip(found, want, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    made = mx_values(*found, dtype=torch.float64)
    top = x.double().view(3, 41, 3, 32).abs().amax(-1, keepdim=True)
    error = (made - x.double()).view(3, 41, 3, 32).abs()
    # Half of the largest step: 5 becomes 4, and what saturates loses less.
    usual = (top < 1e38) & (top > 1e-37)
    assert ((error <= top / (5 if element == "fp4_e2m1" else 16)) | ~usual).all()


@pytest.mark.parametrize("element", ELEMENTS)
def test_groups_with_nan_or_infinity_have_no_scale(element):
    x = torch.ones(2, 64, device=DEVICE)
    x[0, 3], x[1, 40] = float("nan"), float("inf")
    for quantize in (quantize_mx_inputs, quantize_mx_inputs_ref):
        _, exponents = quantize(x, element=element)
        assert (exponents == 255).tolist() == [[True, False], [False, True]]


def test_what_does_not_fit_is_refused():
    (x, codes, exponents), _ = problem(2, 8, 64, "fp4_e2m1")
    with pytest.raises(ValueError, match="bf16"):
        mx_matmul(x.float(), codes, exponents)
    with pytest.raises(ValueError, match="exponents"):
        mx_matmul(x, codes, exponents[:, :1])
    with pytest.raises(ValueError, match="groups of 32"):
        mx_matmul(x, codes[:, :8], exponents)
    with pytest.raises(ValueError, match="bias"):
        mx_matmul(x, codes, exponents, bias=torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="groups of 32"):
        quantize_mx_inputs(x[:, :40], element="fp4_e2m1")
    with pytest.raises(ValueError, match="none of"):
        quantize_mx_inputs(x, element="int8")
