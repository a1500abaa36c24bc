"""GPTQ of a stack of weights finds what it finds of each alone."""

import pytest
import torch
from torch import Tensor

from compressor.ir.qtensor import QuantSpec
from compressor.numerics.gptq import gptq, inverse_factor
from compressor.numerics.gptq_stack import gptq_stack, inverse_factors
from compressor.numerics.grid_search import search_grid

SPECS = (
    QuantSpec("int", 4, "group", 32),
    QuantSpec("int", 3, "group", 32, zero="subtract"),
    QuantSpec("int", 8, "channel"),
)


def problems(count: int = 5) -> tuple[Tensor, Tensor]:
    """Weights [E, O, C] and Gram matrices of inputs that depend on each other, one of few tokens,
    one with inputs that nobody saw, one that calls for more damping."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(count, 24, 160, generator=generator)
    grams = []
    for i in range(count):
        x = torch.randn(20 if i == 1 else 300, 40, generator=generator)
        x = x @ torch.randn(40, 160, generator=generator)
        x = x + 0.3 * torch.randn(len(x), 160, generator=generator)
        if i == 2:
            x[:, 5:20] = 0
        grams.append(x.T @ x)
    grams[3] -= 0.2 * grams[3].diagonal().mean() * torch.eye(160)
    return weights, torch.stack(grams)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_those_of_each_weight_alone(spec: QuantSpec, act_order: bool) -> None:
    weights, grams = problems()
    divisor = torch.linspace(0.5, 2, 160)
    divisors = [None, divisor, None, None, divisor]
    diagonals = grams.diagonal(dim1=1, dim2=2).clamp(min=0)
    starts = search_grid(weights.flatten(0, 1), diagonals, spec)
    inverses = inverse_factors(grams, act_order=act_order, divisors=divisors)
    found = gptq_stack(weights, starts, inverses)
    assert all(inverses.usable)
    for i, (rounded, start) in enumerate(zip(found, starts.parts(5), strict=True)):
        assert torch.equal(start.codes, search_grid(weights[i], diagonals[i], spec).codes)
        alone = inverse_factor(grams[i], act_order=act_order, divisor=divisors[i])
        assert alone is not None and inverses.damping[i] == alone.damping
        assert torch.equal(inverses.factor[i], alone.factor)
        (expected,) = gptq([weights[i]], [start], alone)
        assert torch.equal(rounded.q.codes, expected.q.codes)
        assert rounded.kept == expected.kept
        assert rounded.error == pytest.approx(expected.error, rel=1e-5)
        assert rounded.nearest == pytest.approx(expected.nearest, rel=1e-5)


def test_what_is_of_no_use_is_said_and_spoils_nothing() -> None:
    _, grams = problems()
    good = inverse_factors(grams, divisors=[None] * 5)
    grams[0] = torch.nan
    grams[4] = 0
    found = inverse_factors(grams, divisors=[None] * 5)
    assert found.usable == [False, True, True, True, False]
    assert torch.equal(found.factor[1:4], good.factor[1:4])
