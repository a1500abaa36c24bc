"""Weights for inputs that are not the original model's any more."""

import torch

from compressor.numerics.target_correction import RIDGE, correction


def streams(tokens=300, columns=20, seed=0):
    """The original's inputs, and ours, which are off by something that follows from them."""
    draw = torch.Generator().manual_seed(seed)
    original = torch.randn(tokens, columns, generator=draw, dtype=torch.float64)
    wrong = 0.1 * torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    noise = 0.05 * torch.randn(tokens, columns, generator=draw, dtype=torch.float64)
    return original, original + original @ wrong + noise


def test_it_is_the_solution_of_least_squares_with_a_ridge():
    original, ours = streams()
    weight = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram, cross = ours.T @ ours, (original - ours).T @ ours
    found = correction(gram.float(), cross.float(), strength=1.0).double()
    # The ridge draws W* to W: least squares in W* - W, with rows of sqrt(lambda) and aims of zero.
    ridge = (RIDGE * gram.diagonal().mean()).sqrt()
    rows = torch.cat([ours, ridge * torch.eye(20, dtype=torch.float64)])
    aims = torch.cat([(original - ours) @ weight.T, torch.zeros(20, 7, dtype=torch.float64)])
    best = torch.linalg.lstsq(rows, aims).solution.T
    torch.testing.assert_close(weight @ found, best, rtol=1e-3, atol=1e-4)
    few = correction(gram.float(), cross.float(), strength=1.0, weight=weight).double()
    torch.testing.assert_close(few, weight @ found, rtol=1e-4, atol=1e-5)
    half = correction(gram.float(), cross.float(), strength=0.5).double()
    torch.testing.assert_close(2 * half, found)


def test_the_corrected_weight_does_better_on_other_tokens():
    weight = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    original, ours = streams(tokens=3000)
    (known, seen), (other, unseen) = (
        (original[part], ours[part]) for part in (slice(0, 1500), slice(1500, 3000))
    )
    found = correction(
        (seen.T @ seen).float(), ((known - seen).T @ seen).float(), strength=1.0
    ).double()
    before, after = (
        (unseen @ w.T - other @ weight.T).square().sum() for w in (weight, weight + weight @ found)
    )
    assert after < 0.3 * before


def test_streams_that_agree_and_sums_that_are_not_finite_correct_nothing():
    _, ours = streams()
    gram = (ours.T @ ours).float()
    assert torch.equal(correction(gram, torch.zeros(20, 20), strength=0.5), torch.zeros(20, 20))
    assert correction(gram, torch.full((20, 20), torch.nan), strength=0.5) is None
    assert correction(torch.full((20, 20), torch.inf), torch.zeros(20, 20), strength=0.5) is None
    assert correction(torch.zeros(20, 20), torch.zeros(20, 20), strength=0.5) is None
