"""Sign deltas: what each round leaves, fitted scales, and the gradient of the scales."""

import pytest
import torch

from compressor.numerics.bitdelta import SignDelta, fit_scales, merge, sign_delta


def difference(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 1e-3


@pytest.mark.parametrize("columns", [32, 70, 1])
def test_one_bit_is_the_sign_times_the_mean_magnitude(columns: int) -> None:
    delta = difference(5, columns)
    delta[1] = 0.0
    found = sign_delta(delta, bits=1)
    assert found.signs.shape == (1, -(-columns // 32), 5)
    expected = torch.where(delta >= 0, 1.0, -1.0) * delta.abs().mean()
    torch.testing.assert_close(found.dense(), expected)


def test_each_round_is_better_and_its_scale_the_best_one() -> None:
    delta = difference(40, 70)
    errors = [float(delta.square().mean())]
    for bits in (1, 2, 3, 4):
        found = sign_delta(delta, bits=bits)
        error = float((delta - found.dense()).square().mean())
        # The mean magnitude takes exactly its square off the mean squared error.
        assert error == pytest.approx(errors[-1] - float(found.scales[-1]) ** 2, rel=1e-4)
        for factor in (0.99, 1.01):
            scales = found.scales.clone()
            scales[-1] *= factor
            other = SignDelta(found.signs, scales, 70).dense()
            assert float((delta - other).square().mean()) > error
        errors.append(error)


def test_an_equal_weight_has_a_scale_of_zero_and_merges_to_itself() -> None:
    base = difference(3, 40).bfloat16()
    found = sign_delta(torch.zeros(3, 40), bits=2)
    assert torch.equal(found.scales, torch.zeros(2))
    assert torch.equal(found.merged(base, torch.bfloat16), base)


@pytest.mark.parametrize("bits", [1, 3])
def test_fitted_scales_are_the_least_squares_ones(bits: int) -> None:
    delta, x = difference(24, 50), difference(300, 50, seed=1) * torch.linspace(100, 8000, 50)
    plain = sign_delta(delta, bits=bits)
    fitted = fit_scales(plain, delta, x.T @ x)
    columns = [
        (x.double() @ SignDelta(s[None], torch.ones(1), 50).dense().double().T).flatten()
        for s in plain.signs
    ]
    wanted = (x.double() @ delta.double().T).flatten()
    expected = torch.linalg.lstsq(torch.stack(columns, 1), wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(fitted.scales, expected.float(), rtol=1e-3, atol=1e-7)
    error = [(x.double() @ (delta - d.dense()).double().T).square().sum() for d in (fitted, plain)]
    assert error[0] < error[1]


def test_scales_of_an_expert_that_saw_no_token_stay() -> None:
    delta = difference(8, 32)
    plain = sign_delta(delta, bits=2)
    assert fit_scales(plain, delta, torch.zeros(32, 32)).scales.equal(plain.scales)


def test_the_gradient_of_merged_scales_is_that_of_the_dense_sum() -> None:
    base, delta, x = torch.randn(6, 40), difference(6, 40), torch.randn(9, 40)
    found = sign_delta(delta, bits=2)
    scales = found.scales.clone().requires_grad_()
    hidden = torch.randn(9, 40, requires_grad=True)
    weight = merge(base, found.signs, scales, torch.float32)
    assert torch.equal(weight, found.merged(base, torch.float32))
    ((hidden @ weight.T) * (x @ delta.T)).sum().backward()
    plain = found.scales.double().requires_grad_()
    dense = [SignDelta(s[None], torch.ones(1), 40).dense().double() for s in found.signs]
    out = base.double() + plain[0] * dense[0] + plain[1] * dense[1]
    hidden_2 = hidden.detach().double().requires_grad_()
    ((hidden_2 @ out.T) * (x @ delta.T)).sum().backward()
    assert scales.grad is not None and plain.grad is not None and hidden_2.grad is not None
    torch.testing.assert_close(scales.grad.double(), plain.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), hidden_2.grad, rtol=1e-4, atol=1e-6)
