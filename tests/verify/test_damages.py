"""Files that were damaged and signed again are told from the original's."""

from pathlib import Path

import pytest

from compressor.verify.kernels import check as kernel_checks
from tests.support.damages import CASES, Case


@pytest.mark.parametrize("case, every", [("rotate8", 9), ("smoothquant", 9), ("quest", 7)])
def test_none_that_is_larger_than_rounding_is_missed(
    case: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_checks, "interpreter_runs", lambda: False)
    found = list(Case(case, tmp_path).run(every))
    assert found[0].damage == "none" and not found[0].seen
    assert len(found) > 6
    assert not [row for row in found if row.missed]


@pytest.mark.slow
def test_no_damage_of_any_case_is_missed(tmp_path: Path) -> None:
    for case in CASES:
        assert not [row for row in Case(case, tmp_path).run() if row.missed], case
