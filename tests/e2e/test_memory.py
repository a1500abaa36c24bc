"""Memory of a run is one unit: sixteen layers take what four take, and what the plan said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth_and_is_as_planned(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "measure_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
