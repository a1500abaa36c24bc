"""Runs in which the original model goes beside the quantized one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.checkpoint.source import open_source
from compressor.errors import Interrupted
from compressor.evaluate.perplexity import evaluate
from compressor.plan.recipe import make_recipe
from compressor.run.session import Prepared, choose_device, compile_checkpoint, prepare

GRID = {"bits": 3, "group_size": 32, "min_tokens": 16}
CPU = choose_device("cpu")


def drift(model: Path, output: Path, **more: Any) -> list[float]:
    """Relative error of the hidden states after each block, on tokens that were not calibrated."""
    data = {
        "model": str(model),
        "output": str(output),
        "calibration": {"data": "bundled/prose", "samples": 32, "length": 64},
        "passes": [{"gptq": {**GRID, **more}}],
    }
    compile_checkpoint(prepare(make_recipe(data), device=CPU))
    ids = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(9))
    found = evaluate(
        open_source(output), ids, device=CPU, dtype=torch.float32, against=open_source(model)
    )
    return [block.error for block in found.blocks]


def test_the_correction_keeps_blocks_closer_to_the_original(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    plain = drift(model, tmp_path / "plain", correction=0)
    corrected = drift(model, tmp_path / "corrected")
    assert all(ours < before for ours, before in zip(corrected, plain, strict=True))


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Both streams are replayed from what was written, in the batches that were taken."""
    model = tiny_model("llama", num_hidden_layers=4)

    def ready(output: Path) -> Prepared:
        data = {
            "model": str(model),
            "output": str(output),
            "calibration": {"data": "bundled/prose", "samples": 6, "length": 48},
            "passes": [{"gptq": GRID}],
        }
        return prepare(make_recipe(data), device=CPU)

    compile_checkpoint(ready(tmp_path / "whole"))
    done: list[str] = []
    for units in (2, 4):
        with pytest.raises(Interrupted):
            compile_checkpoint(
                ready(tmp_path / "twice"),
                on_unit=lambda unit: done.append(unit.name),
                stopping=lambda units=units: len(done) >= units,
            )
        done.clear()
    compile_checkpoint(ready(tmp_path / "twice"))
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "twice"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_experts_are_rounded_without_a_correction(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Routed tokens differ between the two models; what is not routed is corrected."""
    model = tiny_model("mixtral")
    plain = drift(model, tmp_path / "plain", correction=0)
    corrected = drift(model, tmp_path / "corrected")
    assert corrected != plain and corrected[-1] < 1.1 * plain[-1]
