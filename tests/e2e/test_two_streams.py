"""Runs in which the original model goes beside the quantized one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.source import open_source
from compressor.evaluate.perplexity import evaluate
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare

GRID = {"bits": 3, "group_size": 32, "scales": "search", "damping": 0.1, "min_tokens": 16}
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
    plain = drift(model, tmp_path / "plain")
    corrected = drift(model, tmp_path / "corrected", correction=0.5)
    assert all(ours < before for ours, before in zip(corrected, plain, strict=True))


def test_experts_are_rounded_without_a_correction(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Routed tokens differ between the two models; what is not routed is corrected."""
    model = tiny_model("mixtral")
    plain = drift(model, tmp_path / "plain")
    corrected = drift(model, tmp_path / "corrected", correction=0.5)
    assert corrected != plain and corrected[-1] < 1.1 * plain[-1]
