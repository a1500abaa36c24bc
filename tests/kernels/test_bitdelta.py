"""The sign product against its reference, its gradients, and the packing's round trip."""

import pytest
import torch
from compressor_kernels.linear.bitdelta import (
    DeltaTiles,
    delta_matmul,
    delta_matmul_ref,
    pack_bits,
    pack_signs,
    unpack_bits,
    unpack_signs,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(tenants, rows, inner, outer, dtype):
    generator = torch.Generator().manual_seed(inner * 31 + outer)
    x = torch.randn(tenants, rows, inner, generator=generator)
    x[..., 0] *= 50  # an outlier channel: the fixed point must keep the small inputs too
    delta = torch.randn(tenants, outer, inner, generator=generator)
    signs = torch.stack([pack_signs(d) for d in delta])
    alpha = torch.rand(tenants, generator=generator) + 0.1
    base = torch.randn(tenants, rows, outer, generator=generator)
    return [t.to(DEVICE) for t in (x.to(dtype), signs, alpha, base.to(dtype))]


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("rows", [1, 37, 128])
def test_bits_round_trip(width, rows):
    bits = torch.rand(2, rows, 5) > 0.5
    packed = pack_bits(bits, width=width)
    assert packed.shape == (2, -(-rows // width), 5)
    assert torch.equal(unpack_bits(packed, rows=rows), bits)


def test_word_k_n_bit_i_is_the_sign_of_output_n_input_32k_plus_i():
    delta = torch.randn(3, 70)
    delta[1, 40] = 0.0
    words = pack_signs(delta)
    assert words.dtype == torch.int32 and words.shape == (3, 3)
    for n in range(3):
        for k in range(70):
            assert ((words[k // 32, n].item() >> (k % 32)) & 1) == (delta[n, k].item() >= 0)
    assert torch.equal(unpack_signs(words, in_features=70), torch.where(delta >= 0, 1, -1))


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 19])
@pytest.mark.parametrize("inner, outer", [(1024, 128), (1100, 72), (64, 5)])
def test_product(rows, inner, outer):
    x, signs, alpha, base = problem(2, rows, inner, outer, torch.float32)
    expected = delta_matmul_ref(x.double(), signs, alpha, base_out=base)
    y = delta_matmul(x, signs, alpha, base_out=base)
    assert (y - expected).norm() <= 1e-5 * (expected - base).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_only_its_output(dtype):
    x, signs, alpha, _ = problem(3, 1, 2080, 96, dtype)
    expected = delta_matmul_ref(x.double(), signs, alpha)
    y = delta_matmul(x, signs, alpha)
    assert y.dtype == dtype
    # Half of it on a device; the interpreter truncates what it stores as bf16.
    rounding = torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= rounding * expected.abs() + 1e-3).all()


def test_a_wide_tile_agrees_with_a_narrow_one():
    x, signs, alpha, _ = problem(1, 4, 1500, 100, torch.float32)
    wide = delta_matmul(x, signs, alpha, tiles=DeltaTiles(block_n=128, tokens=4))
    narrow = delta_matmul(x, signs, alpha, tiles=DeltaTiles(block_n=64, tokens=2))
    assert torch.allclose(wide, narrow, rtol=1e-5, atol=1e-4)


def test_zero_rows_and_zero_alpha():
    x, signs, alpha, base = problem(2, 2, 64, 32, torch.float32)
    x[0, 1] = 0
    alpha[1] = 0
    y = delta_matmul(x, signs, alpha, base_out=base)
    assert torch.equal(y[0, 1], base[0, 1]) and torch.equal(y[1], base[1])


def test_a_nan_input_reaches_every_output_of_its_row():
    x, signs, alpha, _ = problem(1, 2, 64, 32, torch.float32)
    x[0, 0, 9] = float("nan")
    y = delta_matmul(x, signs, alpha)
    assert y[0, 0].isnan().all() and not y[0, 1].isnan().any()


def test_gradients():
    x, signs, alpha, base = problem(2, 3, 96, 40, torch.float32)
    weight = torch.randn(2, 3, 40, device=DEVICE)
    grads = []
    for function in (delta_matmul, delta_matmul_ref):
        leaves = [t.clone().requires_grad_() for t in (x, alpha, base)]
        (function(leaves[0], signs, leaves[1], base_out=leaves[2]) * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_refuses_shapes_that_do_not_fit():
    x, signs, alpha, base = problem(2, 1, 64, 8, torch.float32)
    for arguments in (
        (x, signs[:, :1], alpha, None),
        (x, signs, alpha[:1], None),
        (x, signs, alpha, base[:, :, :4]),
        (x[0], signs, alpha, None),
    ):
        with pytest.raises(ValueError):
            delta_matmul(*arguments[:3], base_out=arguments[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_precision_inputs_of_any_width(dtype):
    """Sums of S x beyond the range of fp16 do not spoil the gradient of alpha."""
    x, signs, alpha, _ = problem(2, 2, 1100, 24, dtype)
    x = x + 60  # S x is a sum of 1100 such numbers
    signs[0] = -1  # all positive: 66,000 in every output
    weight = torch.full((2, 2, 24), 1e-2, device=DEVICE)
    expected = [t.double().requires_grad_() for t in (x, alpha)]
    (delta_matmul_ref(expected[0], signs, expected[1]) * weight).sum().backward()
    leaves = [t.clone().requires_grad_() for t in (x, alpha)]
    (delta_matmul(leaves[0], signs, leaves[1]).float() * weight).sum().backward()
    for ours, theirs in zip(leaves, expected, strict=True):
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 4 * torch.finfo(dtype).eps


REAL_SHAPES = [
    (16, 1, 4096, 4096),
    (16, 16, 4096, 4096),
    (2, 37, 11008, 4096),
    (3, 300, 1100, 72),
    (5, 7, 4099, 1027),
    (1, 1, 31, 5),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tenants, rows, inner, outer", REAL_SHAPES)
def test_products_and_gradients_at_real_shapes(tenants, rows, inner, outer, dtype):
    """Against float64 through dense signs: every output is the exact sum, rounded once, and the
    same in every run; gradients are those of x, alpha and the base's product."""
    x, signs, alpha, base = problem(tenants, rows, inner, outer, dtype)
    alpha = alpha / inner**0.5  # outputs within fp16
    generator = torch.Generator().manual_seed(outer)
    weight = torch.randn(base.shape, generator=generator).to(DEVICE)
    found = []
    for function, make in ((delta_matmul, torch.clone), (delta_matmul_ref, torch.Tensor.double)):
        leaves = [make(t).requires_grad_() for t in (x, alpha, base)]
        y = function(leaves[0], signs, leaves[1], base_out=leaves[2])
        (y.double() * weight).sum().backward()
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    (y, *ours), (expected, *theirs) = found
    assert y.dtype == dtype and y.shape == expected.shape
    magnitudes = alpha.double()[:, None] * x.double().abs().sum(-1) + 1
    # The interpreter truncates what it stores as bf16; a device rounds.
    rounding = torch.finfo(dtype).eps / (2 if x.is_cuda else 1)
    bound = rounding * expected.abs() + 2**-20 * magnitudes[..., None]
    assert ((y.double() - expected).abs() <= bound).all()
    assert torch.equal(y, delta_matmul(x, signs, alpha, base_out=base))
    for mine, exact, leaf in zip(ours, theirs, (x, alpha, base), strict=True):
        assert mine.dtype == leaf.dtype and mine.isfinite().all()
        assert (mine.double() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_found_again_by_training(dtype):
    """AdamW over alpha alone, through two products of which the second needs the gradient of x."""
    x, first, alpha, _ = problem(4, 16, 512, 256, dtype)
    x = x / x.float().norm(dim=-1, keepdim=True).to(dtype)
    _, second, _, _ = problem(4, 16, 256, 192, dtype)
    wanted = torch.stack([alpha, alpha.flip(0)])

    def product(scales):
        return delta_matmul(delta_matmul(x, first, scales[0]), second, scales[1]).float()

    target = product(wanted)
    scales = torch.full_like(wanted, 0.6).requires_grad_()
    optimizer = torch.optim.AdamW([scales], lr=0.03, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        (product(scales) - target).square().mean().backward()
        optimizer.step()
    # Only the product of both scales of a tenant shows in the output.
    found, sought = scales.detach().prod(0), wanted.prod(0)
    assert torch.allclose(found, sought, rtol=0.02)
