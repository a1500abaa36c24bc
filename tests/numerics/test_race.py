"""A race of candidates: some rows leave only those that may be the best."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from compressor.ir.qtensor import QuantSpec
from compressor.numerics import race
from compressor.numerics.awq_search import search_scales_gram
from compressor.numerics.gram import gram_error, row_errors

SPEC = QuantSpec(element="int", bits=4, strategy="group", group_size=32, zero="subtract")


def problem(rows: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the Gram matrix of inputs whose channels differ by `spread`, and their size."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(spread * torch.randn(192, generator=generator))
    x = torch.randn(512, 192, generator=generator) * size
    return torch.randn(rows, 192, generator=generator), x.t() @ x, x.abs().mean(0)


def test_rows_errors_add_up_to_the_whole() -> None:
    delta, gram, _ = problem(64, 1.0)
    rows = row_errors(delta, gram)
    torch.testing.assert_close(rows, ((delta @ gram) * delta).sum(1), rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(rows.sum(), gram_error(delta, gram), rtol=1e-2, atol=0)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
def test_a_search_finds_what_it_finds_on_all_rows(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram, absmean = problem(1024, spread)
    raced = search_scales_gram(list(weight.split([300, 724])), gram, absmean, SPEC)
    monkeypatch.setattr(race, "FEWEST", 2**30)
    whole = search_scales_gram(list(weight.split([300, 724])), gram, absmean, SPEC)
    assert torch.equal(raced.scales, whole.scales) and raced.ratio == whole.ratio
    worked_out = [loss for loss in raced.losses if loss < float("inf")]
    assert min(worked_out) == min(whole.losses)
    assert len(worked_out) < 12 or spread < 1  # channels that are alike leave nothing to choose


def test_rows_that_tell_nothing_leave_everyone() -> None:
    asked: list[Sequence[int]] = []

    def noise(tried: Sequence[int]) -> torch.Tensor:
        asked.append(tried)
        return 1 + torch.rand(len(tried), 128, generator=torch.Generator().manual_seed(1))

    assert race.left(noise, 9) == list(range(9))
    assert asked == [[0, 4, 8]]


def test_what_is_not_finite_is_left_for_all_rows_to_judge() -> None:
    losses = torch.arange(1.0, 6.0)[:, None] + torch.rand(5, 128) / 10
    losses[3] = torch.nan
    assert race.left(lambda tried: losses[list(tried)], 5) == [0, 3]
    assert race.every(511) is None and race.every(4096) == race.PART
