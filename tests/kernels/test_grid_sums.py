"""What candidates of integer grids come to, against the plain reference and in a search."""

import pytest
import torch
from compressor_kernels.search.grid_sums import grid_sums, grid_sums_ref

from compressor.methods.gptq import Gptq
from compressor.numerics import grid_search
from compressor.numerics.grid_search import search_grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(("bits", "zeros", "lowest"), [(4, False, 1), (3, True, 0), (8, False, 0)])
@pytest.mark.parametrize(("count", "size", "period"), [(12, 16, 4), (37, 128, 37), (3, 100, 1)])
def test_sums(count, size, period, bits, zeros, lowest):
    groups, counts = drawn(count, size), drawn(period, size, seed=1).abs()
    scales = drawn(count, seed=2) * 0.3
    scales[0] = 0
    points = torch.full((count,), 2.0, device=DEVICE) if zeros else None
    found = grid_sums(groups, counts, scales, points, bits=bits, lowest=lowest)
    wanted = grid_sums_ref(groups, counts, scales, points, bits=bits, lowest=lowest)
    assert torch.isinf(found[0, 0])
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("rows", "columns", "size"), [(4096, 11008, 128), (1003, 576, 64)])
def test_real_shapes_on_a_device(rows, columns, size, zeros):
    groups, counts = drawn(rows * columns // size, size), drawn(columns // size, size, seed=1).abs()
    scales = drawn(len(groups), seed=2).abs() * 0.2 + 0.1
    points = torch.full_like(scales, 7) if zeros else None
    found = grid_sums(groups, counts, scales, points, bits=4)
    wanted = grid_sums_ref(groups, counts, scales, points, bits=4)
    assert torch.allclose(found[0], wanted[0], rtol=1e-3, atol=1e-3)
    # Of a weight half-way between two codes either is nearest: its error is the same, k is not.
    steps = (groups / scales[:, None]).abs()
    between = ((steps - steps.floor() - 0.5).abs() < 1e-5).any(1)
    assert between.float().mean() < 0.01
    assert torch.allclose(found[:, ~between], wanted[:, ~between], rtol=1e-3, atol=1e-3)
    assert torch.equal(grid_sums(groups, counts, scales, points, bits=4), found)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_search_finds_grids_as_good_through_it(symmetric, stacked, monkeypatch):
    spec = Gptq(group_size=16, bits=3, symmetric=symmetric).effects().scheme.weight
    weight, diagonal = drawn(12, 64), drawn(2, 64, seed=1).abs()
    diagonal = diagonal if stacked else diagonal[0]
    errors = []
    for fused in (False, True):
        monkeypatch.setattr(grid_search._Search, "fused", fused)
        q = search_grid(weight, diagonal, spec)
        each = diagonal.repeat_interleave(6, 0) if stacked else diagonal
        errors.append(float(((q.dequantize() - weight).square() * each).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="\\[3\\]"):
        grid_sums(torch.zeros(2, 16), torch.zeros(1, 16), torch.zeros(3), None, bits=4)
