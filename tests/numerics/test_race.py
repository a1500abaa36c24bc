"""Candidates that some rows rule out."""

import pytest
import torch

from compressor.numerics import race


@pytest.mark.parametrize("best", [0, 3, 7, 20])
def test_the_best_stays_and_what_is_far_from_it_goes(best: int) -> None:
    generator = torch.Generator().manual_seed(best)
    rows = torch.rand(256, generator=generator)
    distance = (torch.arange(21) - best).abs()[:, None]
    noise = 0.01 * torch.randn(21, 256, generator=generator)
    assert race.remaining(rows * (1 + 0.1 * distance) + noise) == [best]


def test_where_nothing_can_be_told_all_stay() -> None:
    losses = torch.randn(21, 256, generator=torch.Generator().manual_seed(0))
    assert race.remaining(losses) == list(range(21))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_candidates(count: int) -> None:
    assert race.remaining(torch.arange(1.0, count + 1)[:, None] * torch.ones(1, 256)) == [0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_judged(value: float) -> None:
    losses = torch.arange(1.0, 6.0)[:, None] * torch.ones(1, 256)
    losses[3, 5] = value
    assert race.remaining(losses) == [0, 3]


@pytest.mark.parametrize(
    "rows, step", [(100, None), (511, None), (512, 4), (4096, 16), (10**5, 16)]
)
def test_rows_that_are_looked_at(rows: int, step: int | None) -> None:
    assert race.stride(rows) == step


@pytest.mark.parametrize("rows, parts", [(512, 8), (960, 15), (4096, 16)])
def test_parts_that_rows_are_looked_at_in(rows: int, parts: int) -> None:
    assert race.looks(rows) == parts


def test_the_more_rows_are_known_the_fewer_candidates_may_be_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(512, generator=generator)
    losses = rows * (1 + 0.005 * torch.arange(21)[:, None])
    losses += 0.2 * torch.randn(21, 512, generator=generator)
    best = int(losses.mean(1).argmin())
    known = {step: losses[:, ::step] for step in (8, 4, 2, 1)}
    left = [race.remaining(some, race.careful(some.shape[1], 512)) for some in known.values()]
    assert all(best in some for some in left)
    assert len(left[0]) > len(left[1]) >= len(left[2]) and left[3] == [best]
    losses[5, 0] = torch.nan
    assert 5 in race.remaining(losses[:, :256])
