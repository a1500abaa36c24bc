"""SIGKILL at random moments, then the same command: the same bytes as an uninterrupted run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

PASSES = {
    "quantized": [{"awq": {"bits": 4, "group_size": 32}}],
    "original": [{"awq": {"bits": 4, "group_size": 32, "symmetric": False}}],
}


@pytest.mark.parametrize("propagate", ["quantized", "original"])
def test_killed_runs_continue_to_the_same_bytes(
    propagate: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = {
        "model": str(tiny_model("llama", num_hidden_layers=8)),
        "output": "unused",
        "calibration": {"samples": 16, "length": 64},
        "passes": PASSES[propagate],
        "propagate": propagate,
        "max_shard_size": "200KB",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    driver = Path(__file__).with_name("killing.py")
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path / "recipe.yaml"), str(output), "7"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    story = json.loads(done.stdout.splitlines()[-1])
    assert story["kills"] >= 3
    whole = tmp_path / "out-whole"
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in output.iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 1
    for name in names:
        assert (whole / name).read_bytes() == (output / name).read_bytes(), name
