"""Figures are written to the digits that their standard errors leave."""

import pytest

from compressor.report.text import MISSING, figure, share_with_error, with_error


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (61.2345, 2.4, "61.2 ± 2.4"),
        (0.0912, 0.002, "0.0912 ± 0.0020"),
        (0.09123456, 0.000996, "0.0912 ± 0.0010"),
        (1234.567, 12.3, "1,235 ± 12"),
        (661.4, 662.0, "661 ± 662"),
        (1.0, 0.0, "1"),
        (1.0, None, "1"),
        (3.2e-9, 1e-10, "3.2e-9 ± 1.0e-10"),
        (None, None, MISSING),
    ],
)
def test_with_error(value: float | None, error: float | None, said: str) -> None:
    assert with_error({"value": value, "error": error}) == said
    assert figure({"value": value, "error": error}) == said.partition(" ± ")[0]


def test_a_share() -> None:
    assert share_with_error({"value": 0.8101, "error": 0.0123}) == "81.0% ± 1.2%"
    assert share_with_error({"value": 1.0, "error": 0.0}) == "100%"
