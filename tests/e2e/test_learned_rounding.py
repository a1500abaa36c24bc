"""Runs that learn rounding by gradients, and what is left of one that was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import Interrupted
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare

RECONSTRUCT = {
    "reconstruct": {"bits": 3, "group_size": 32, "preset": "fast", "batch": 4, "held_back": 4}
}
SIGNROUND = {"signround": {"bits": 3, "group_size": 32, "steps": 6, "batch": 4, "rate": 0.1}}


def run(model: Path, output: Path, entry: Any, **how: Any) -> dict[str, bytes]:
    data = {
        "model": str(model),
        "output": str(output),
        "calibration": {"data": "bundled/prose", "samples": 8, "length": 32},
        "passes": [entry],
    }
    compile_checkpoint(prepare(make_recipe(data), device=choose_device("cpu")), **how)
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


@pytest.mark.parametrize("entry", [SIGNROUND, RECONSTRUCT], ids=lambda entry: next(iter(entry)))
def test_a_stopped_run_continues_to_the_same_bytes(
    entry: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    told: list[tuple[str, int, int, float]] = []
    whole = run(model, tmp_path / "whole", entry, on_fit=lambda *found: told.append(found))
    blocks = [f"model.layers.{i}" for i in range(3)]
    assert list(dict.fromkeys(name for name, *_ in told)) == blocks
    assert all(done < total and loss > 0 for _, done, total, loss in told)
    fits: list[str] = []
    with pytest.raises(Interrupted):  # in the middle of the second block
        run(
            model,
            tmp_path / "stopped",
            entry,
            on_fit=lambda name, *_: fits.append(name),
            stopping=lambda: blocks[1] in fits,
        )
    fits.clear()
    assert (
        run(model, tmp_path / "stopped", entry, on_fit=lambda name, *_: fits.append(name)) == whole
    )
    assert blocks[0] not in fits and blocks[1] in fits
