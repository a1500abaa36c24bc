"""AWQ's candidate errors and clipping bounds against their plain references."""

import pytest
import torch
from compressor_kernels.search.awq_candidate import (
    CLIP_SIZES,
    candidate_delta,
    candidate_delta_ref,
    clip_bounds,
    clip_bounds_ref,
)

from compressor.ir.qtensor import QuantSpec
from compressor.numerics import fake_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def matrix(rows, columns, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    scales = torch.exp(torch.randn(columns, generator=generator))
    return weight.to(DEVICE, dtype), scales.to(DEVICE)


def gram_blocks(columns, size, *, seed=1):
    x = torch.randn(columns // size, 3 * size, size, generator=torch.Generator().manual_seed(seed))
    return (x.mT @ x).to(DEVICE)


def assert_same_codes(found, want, *, share=1e-3):
    """Equal but for bfloat16, and for the rare weight between two codes."""
    off = (found.float() - want.float()).abs() > 1e-2 * want.float().abs() + 1e-6
    assert found.isfinite().all()
    assert off.float().mean() <= share


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "group"), [((7, 96), 32), ((33, 256), 128), ((5, 100), 20), ((3, 300), None)]
)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_candidate_delta(shape, group, symmetric, stored):
    weight, scales = matrix(*shape)
    options = {"bits": 4, "group_size": group, "symmetric": symmetric, "stored": stored}
    found = candidate_delta(weight, scales, **options)
    assert found.dtype == torch.bfloat16 and found.shape == weight.shape
    assert_same_codes(found, candidate_delta_ref(weight, scales, **options))


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_and_dtypes(bits, dtype):
    weight, scales = matrix(19, 192, dtype=dtype)
    weight[3] = 0
    weight[4] = weight[4].abs()
    options = {"bits": bits, "group_size": 64, "symmetric": False, "stored": torch.bfloat16}
    found = candidate_delta(weight, scales, **options)
    assert_same_codes(found, candidate_delta_ref(weight, scales, **options))
    assert (found[3] == 0).all()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_groups_of_one_sign_and_of_odd_sizes(stored):
    weight, _ = matrix(9, 64)
    weight[:6] = 0.2 + 0.1 * weight[:6].abs() / weight.abs().max()
    weight[1] *= -1
    weight[2] = 0.3
    weight[3, 1:] = 0
    weight[4] *= 1e-7
    weight[5] *= 1e6
    scales = torch.ones(64, device=DEVICE)
    options = {"bits": 4, "group_size": 32, "stored": stored}
    found = candidate_delta(weight, scales, symmetric=False, **options)
    assert_same_codes(found, candidate_delta_ref(weight, scales, symmetric=False, **options))
    symmetric = candidate_delta(weight, scales, symmetric=True, **options)
    errors = [x[:6].float().square().sum(1) for x in (found, symmetric)]
    assert (errors[0] <= errors[1] * 1.01).all()
    assert (errors[0][:2] < 0.5 * errors[1][:2]).all()


@pytest.mark.parametrize("count", [None, 1, 2])
def test_several_candidates_are_those_of_each(count):
    both = [matrix(9, 64, seed=seed) for seed in range(count or 1)]
    weight, scales = (torch.stack(parts) for parts in zip(*both, strict=True))
    if count is None:
        weight, scales = weight[0], scales[0]
    every = torch.stack([scales, scales.sqrt(), torch.ones_like(scales)])
    options = {"bits": 4, "group_size": 32, "symmetric": False, "stored": torch.bfloat16}
    found = candidate_delta(weight, every, **options)
    assert found.shape == (3, *weight.shape)
    for one, candidate in zip(found, every, strict=True):
        assert torch.equal(one, candidate_delta(weight, candidate, **options))
    assert_same_codes(found, candidate_delta_ref(weight, every, **options))


def test_candidate_delta_writes_where_it_is_told():
    weight, scales = matrix(8, 64)
    store = torch.full((16, 64), 7.0, dtype=torch.bfloat16, device=DEVICE)
    options = {"bits": 4, "group_size": 32, "symmetric": True, "stored": torch.float32}
    candidate_delta(weight, scales, out=store[4:12], **options)
    assert (store[:4] == 7).all() and (store[12:] == 7).all()
    assert torch.equal(store[4:12], candidate_delta(weight, scales, **options))


def errors_at(weight, gram, options, found, signed):
    """What the quantizer makes of bounds that were found, in float64."""
    rows, size = len(weight), gram.shape[-1]
    zero = "none" if options["symmetric"] else "subtract"
    spec = QuantSpec(
        "int", options["bits"], "group", size, zero=zero, scale_dtype=options["stored"]
    )
    rounded = fake_quantize(weight, spec, clip_max=found, from_range=True, signed=signed)
    groups = (rounded - weight).double().view(rows, -1, size)
    return torch.einsum("rgi,gij,rgj->rg", groups, gram.double(), groups).float()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("size", "stored"), [(32, torch.float32), (128, torch.bfloat16)])
def test_clip_bounds(size, symmetric, stored):
    weight, _ = matrix(37, 2 * size)
    weight[:, 3] *= 6
    gram = gram_blocks(2 * size, size)
    options = {"bits": 3, "symmetric": symmetric, "stored": stored}
    found, errors, signed = clip_bounds(weight, gram, **options)
    want, least, _ = clip_bounds_ref(weight, gram, **options)
    largest = weight.view(37, 2, size).abs().amax(-1)
    assert (want < 0.96 * largest).float().mean() > 0.3, "nothing to clip here"
    # Between bounds that are as good rounding decides: tensor cores keep 10 bits of each factor.
    at_found = errors_at(weight, gram, options, found, signed)
    torch.testing.assert_close(at_found, least, rtol=2e-3, atol=0)
    assert (found <= largest * 1.0001).all() and (found >= 0.54 * largest).all()
    torch.testing.assert_close(errors, least, rtol=5e-3, atol=0)
    if symmetric:
        assert signed is None
    else:
        assert 0.2 < signed.float().mean() < 0.95, "one kind of grid alone"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_the_search_takes_the_codes_that_the_quantizer_takes(stored):
    """Of weights many of which lie half-way between two codes, or beyond what is usual."""
    size = 32
    weight, _ = matrix(24, 2 * size, dtype=torch.bfloat16)
    weight = weight.float()
    steps = torch.arange(size, device=DEVICE) - 7
    weight[:8, :size] = (steps * 0.5) * weight[:8, :1].abs() * 2  # halves of the grid's step
    weight[8:12] = 0.2 + weight[8:12].abs()
    weight[12] = 0
    weight[13] *= 1e-6
    weight[14] *= 1e7
    gram = torch.eye(size, device=DEVICE).expand(2, -1, -1).contiguous()
    options = {"bits": 4, "symmetric": False, "stored": stored}
    found, errors, signed = clip_bounds(weight, gram, **options)
    at_found = errors_at(weight, gram, options, found, signed)
    torch.testing.assert_close(errors, at_found, rtol=2e-3, atol=0)
    _, least, _ = clip_bounds_ref(weight, gram, **options)
    torch.testing.assert_close(errors, least, rtol=2e-3, atol=0)


@pytest.mark.parametrize("size", CLIP_SIZES)
def test_groups_of_every_size(size):
    weight, _ = matrix(21, size)
    gram = gram_blocks(size, size)
    options = {"bits": 4, "symmetric": False, "stored": torch.bfloat16}
    _, errors, _ = clip_bounds(weight, gram, **options)
    _, least, _ = clip_bounds_ref(weight, gram, **options)
    torch.testing.assert_close(errors, least, rtol=5e-3, atol=0)


@pytest.mark.parametrize("rows", [37, 64])
def test_a_stack_is_its_parts(rows):
    size, options = 32, {"bits": 4, "symmetric": False, "stored": torch.bfloat16}
    both = [matrix(rows, 2 * size, seed=seed) for seed in range(2)]
    weights, scales = (torch.stack(parts) for parts in zip(*both, strict=True))
    grams = torch.stack([gram_blocks(2 * size, size, seed=seed) for seed in range(2)])
    deltas = candidate_delta(weights, scales, group_size=size, **options)
    found = clip_bounds(weights, grams, **options)
    for i, (weight, scale) in enumerate(both):
        one = candidate_delta(weight, scale, group_size=size, **options)
        assert torch.equal(deltas[i], one)
        for of_all, of_one in zip(found, clip_bounds(weight, grams[i], **options), strict=True):
            assert torch.equal(of_all[i], of_one)
    assert_same_codes(deltas, candidate_delta_ref(weights, scales, group_size=size, **options))
    want, _, _ = clip_bounds_ref(weights, grams, **options)
    assert torch.isclose(found[0], want).float().mean() > 0.95


def test_what_does_not_fit_is_refused():
    weight, scales = matrix(4, 96)
    options = {"bits": 4, "symmetric": True, "stored": torch.float32}
    with pytest.raises(ValueError, match="groups of 64"):
        candidate_delta(weight, scales, group_size=64, **options)
    with pytest.raises(ValueError, match="scales"):
        candidate_delta(weight, scales[:5], group_size=32, **options)
    with pytest.raises(ValueError, match="contiguous"):
        candidate_delta(weight.t(), scales[:4], group_size=None, **options)
    with pytest.raises(ValueError, match="9 bits"):
        candidate_delta(weight, scales, group_size=32, **{**options, "bits": 9})
    with pytest.raises(ValueError, match="gram"):
        clip_bounds(weight, gram_blocks(64, 32), **options)
