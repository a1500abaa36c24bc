"""Inputs rounded to NVFP4, to the bit of the plain version and of the compiler's own."""

import pytest
import torch
from compressor_kernels.inputs.nvfp4_inputs import (
    RULES,
    full_range,
    quantize_nvfp4_inputs,
    quantize_nvfp4_inputs_ref,
)

from compressor.formats.shared.e2m1 import pack_nibbles
from compressor.numerics.nvfp4 import quantize_nvfp4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INPUTS = [torch.float16, torch.bfloat16, torch.float32]
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def inputs(*shape, dtype, seed=0):
    """Blocks of many magnitudes, some of zeros."""
    generator = torch.Generator().manual_seed(seed + shape[-1])
    x = torch.randn(*shape, generator=generator)
    blocks = x.view(-1, 16)
    blocks *= (torch.randn(len(blocks), 1, generator=generator) * 3).exp()
    blocks[::7] = 0
    return x.clamp(-6e4, 6e4).to(dtype).to(DEVICE)


def decoded(codes, scales, second):
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    values = VALUES.to(codes.device)[both].unflatten(-1, (-1, 16))
    return (values * scales.float().unsqueeze(-1) * second).flatten(-2)


def assert_same(x, rule, amax=None):
    codes, scales, second = quantize_nvfp4_inputs(x, rule=rule, amax=amax)
    wanted = quantize_nvfp4_inputs_ref(x, rule=rule, amax=amax)
    assert torch.equal(second, wanted[2])
    differs = (scales.view(torch.uint8) != wanted[1].view(torch.uint8)) | (
        (codes != wanted[0]).unflatten(-1, (-1, 8)).any(-1)
    )
    if rule == "static_6":
        assert not differs.any()
        return
    # Two candidates may be equally far off, to the rounding of sums taken in another order.
    assert differs.float().mean() <= 0.002
    errors = [
        (decoded(*made) - x.float()).unflatten(-1, (-1, 16))[differs].abs().double()
        for made in ((codes, scales, second), wanted)
    ]
    norm = {"mse": lambda e: e.square().sum(-1), "mae": lambda e: e.sum(-1)}
    ours, theirs = map(norm.get(rule, lambda e: e.amax(-1)), errors)
    assert torch.allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("shape", [(5, 576), (3, 16), (2, 7, 1040)])
def test_inputs(shape, dtype, rule):
    assert_same(inputs(*shape, dtype=dtype), rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_calibrated_scale_saturates(rule):
    x = inputs(6, 256, dtype=torch.float16)
    amax = x.abs().amax().float().reshape(1) / 50
    assert_same(x, rule, amax)
    codes, scales, second = quantize_nvfp4_inputs(x, rule=rule, amax=amax)
    assert torch.allclose(second, amax / full_range(rule))
    assert scales.float().max() == 448.0 and ((codes & 7) == 7).any()


@pytest.mark.parametrize("rule", RULES)
def test_the_compilers_weights_are_rounded_alike(rule):
    x = inputs(9, 320, dtype=torch.float32).cpu()
    ours = quantize_nvfp4_inputs_ref(x, rule=rule)
    theirs = quantize_nvfp4(x, rule=rule)
    same = ours[1].view(torch.uint8) == theirs.scales.view(torch.uint8)
    assert same.all() if rule == "static_6" else same.float().mean() > 0.99
    assert torch.equal(ours[2], theirs.second.reshape(1))
    packed = pack_nibbles(theirs.codes)
    assert torch.equal(ours[0].view(9, -1, 8)[same], packed.view(9, -1, 8)[same])


def test_every_tie_goes_to_the_even_code():
    # block absmax 6 under amax 6·448·2^-9·... : scale and global scale are powers of two
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5]
    x = torch.tensor([[*ties, -5.0, 0.0]], device=DEVICE)
    amax = torch.tensor([2688.0], device=DEVICE)
    codes, scales, second = quantize_nvfp4_inputs(x, amax=amax)
    assert scales.float().item() == 1.0 and second.item() == 1.0
    expected = [0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, 0]
    assert decoded(codes, scales, second).flatten().tolist() == expected
    assert codes[0, 4].item() & 15 == 8  # -0.25 keeps its sign


def test_values_next_to_ties_and_powers_of_two():
    amax = torch.tensor([2688.0])  # with an absmax of 6 the scale and the global scale are 1
    edges = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 1e-20])
    steps = torch.arange(-4, 5, dtype=torch.int32)[:, None]
    near = (edges.view(torch.int32) + steps).clamp(min=0).view(torch.float32)
    x = torch.cat([near, torch.full((len(near), 1), 6.0)], 1)
    assert_same(torch.cat([x, -x]).to(DEVICE), "static_6", amax.to(DEVICE))


@pytest.mark.parametrize("rule", RULES)
def test_zeros_and_vanishing_inputs(rule):
    x = torch.zeros(3, 32, device=DEVICE)
    codes, scales, second = quantize_nvfp4_inputs(x, rule=rule)
    assert not codes.any() and not scales.float().any() and second.item() == 1.0
    x[1] = 1e-38
    assert_same(x, rule)


def test_four_over_six_is_closer():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    six, four = (
        (decoded(*quantize_nvfp4_inputs(x, rule=r)) - x).square().mean()
        for r in ("static_6", "mse")
    )
    assert four < 0.9 * six


def test_empty_and_strided():
    x = inputs(4, 256, dtype=torch.float16)
    codes, scales, _ = quantize_nvfp4_inputs(x[:0])
    assert codes.shape == (0, 128) and scales.shape == (0, 16)
    assert_same(x[::2, ::2], "static_6")


def test_refuses_what_does_not_fit():
    x = inputs(2, 64, dtype=torch.float16)
    for bad, options in (
        (x[:, :40], {}),
        (x.to(torch.int32), {}),
        (x, {"rule": "static_4"}),
        (x, {"amax": torch.ones(1, dtype=torch.float16)}),
        (x, {"amax": torch.ones(2)}),
    ):
        with pytest.raises(ValueError):
            quantize_nvfp4_inputs(bad, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(2048, 4096), (777, 14336)])
def test_real_shapes(shape, rule):
    assert_same(inputs(*shape, dtype=torch.bfloat16), rule)
