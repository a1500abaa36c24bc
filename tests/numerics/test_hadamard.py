"""Rotations are orthogonal, flat where a Hadamard matrix is known, and leave a mean if asked."""

import pytest
import torch

from compressor.numerics.hadamard import hadamard, rotation

SIZES = (1, 2, 3, 9, 12, 16, 18, 36, 60, 80, 96, 100, 128, 576)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"keep_mean": True}])
def test_rotations_are_orthogonal(size, options):
    turn = rotation(size, **options)
    matrix = turn.matrix()
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, atol=1e-12, rtol=0)
    x = torch.randn(3, 5, size, dtype=torch.float64)
    torch.testing.assert_close(turn.right(x), x @ matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(turn.left(x[0].T), matrix.T @ x[0].T, atol=1e-12, rtol=0)
    assert turn.right(x.float()).dtype == torch.float32
    if options.get("keep_mean"):
        torch.testing.assert_close(matrix.sum(0), torch.ones_like(matrix[0]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 68, 76, 84])
def test_known_orders_hold_plus_and_minus_one(order):
    matrix = hadamard(order)
    assert matrix is not None and set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert (matrix[0] == 1).all()


@pytest.mark.parametrize("size", [96, 160, 576, 896, 960, 1536, 2560, 3072, 3584, 5120, 5376])
def test_hidden_sizes_of_models_have_a_flat_rotation(size):
    one = torch.zeros(1, size, dtype=torch.float64)
    one[0, 5] = 1
    spread = rotation(size).right(one).abs()
    torch.testing.assert_close(spread, torch.full_like(spread, size**-0.5), atol=1e-12, rtol=0)


def test_orders_without_a_construction_are_still_orthogonal():
    assert hadamard(92) is None and hadamard(10) is None
    outlier = torch.zeros(1, 92)
    outlier[0, 3] = 1
    assert rotation(92).right(outlier).abs().max() < 0.2


def test_signs_come_from_the_seed_alone():
    one, again, other = (rotation(64, seed=s).matrix() for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
