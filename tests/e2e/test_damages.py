"""Files that were damaged and signed again are told from the original's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from compressor.verify.kernels import check as kernel_checks

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure" / "damages.py"


@pytest.fixture(scope="module")
def damages() -> ModuleType:
    """The script that tries all of them."""
    spec = importlib.util.spec_from_file_location("measure_damages", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["measure_damages"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case, every", [("rotate8", 9), ("smoothquant", 9), ("quest", 7)])
def test_none_that_is_larger_than_rounding_is_missed(
    damages: ModuleType, case: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_checks, "interpreter_runs", lambda: False)
    found = list(damages.Bench(case, tmp_path).run(every))
    assert found[0].damage == "none" and not found[0].seen
    assert len(found) > 6
    assert not [row for row in found if row.missed]


@pytest.mark.slow
def test_no_damage_of_any_case_is_missed(damages: ModuleType, tmp_path: Path) -> None:
    for case in damages.CASES:
        assert not [row for row in damages.Bench(case, tmp_path).run() if row.missed], case
