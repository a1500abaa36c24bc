"""Whole low-bit runs on families with something of their own: heads, biases, fused rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.evaluate.perplexity import evaluate
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.verify import verify

CPU = choose_device("cpu")
STATIC = {"bits": 8, "group_size": None, "activations": "static"}
CASES: dict[str, tuple[str, list[Any], dict[str, Any], float]] = {
    "head-too": (
        "qwen3",
        [{"smoothquant": {"bits": 8, "activations": "static", "ignore": [], "fold_up": True}}],
        {},
        0.02,
    ),
    "untied-head": ("qwen2", [{"fp8": {"scales": "static", "ignore": []}}], {"untie": True}, 0.03),
    "fused-rows": ("phi3", ["nvfp4", {"kv_cache": {"scales": "head"}}], {}, 0.2),
    "cache-first": (
        "opt",
        [{"kv_cache": {"element": "int8"}}, {"nvfp4": {"activations": "calibrated"}}],
        {},
        0.1,
    ),
    "experts": (
        "mixtral",
        [{"smoothquant": {"alpha": "search", "fold_up": True}}, {"gptq": STATIC}],
        {},
        0.3,
    ),
    "offset-norms": ("gemma2", ["awq", {"nvfp4": {"activations": "calibrated"}}], {}, 0.2),
    "microscaled": ("llama", ["awq", {"mxfp4": {"activations": "dynamic"}}, "kv_cache"], {}, 0.4),
    "microscaled-experts": (
        "mixtral",
        [{"mxfp8": {"activations": "dynamic", "ignore": []}}],
        {"untie": True},
        0.1,
    ),
    "small-experts": (
        "qwen3_moe",
        [{"awq": {"search": "inputs"}}, {"nvfp4": {"activations": "calibrated"}}, "kv_cache"],
        {},
        0.4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_runs_and_stays_close(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model_type, passes, top, limit = CASES[name]
    model = tiny_model(model_type)
    recipe = make_recipe(
        {
            "model": str(model),
            "output": str(tmp_path / "out"),
            "calibration": {"samples": 8, "length": 32},
            "passes": passes,
            **top,
        }
    )
    output = compile_checkpoint(prepare(recipe, device=CPU)).output
    ids = torch.randint(2, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    found = evaluate(
        open_source(output), ids, device=CPU, dtype=torch.float32, against=open_source(model)
    )
    assert found.kl is not None
    assert 1e-5 < found.kl.value < limit
    report = verify(output, device=CPU)
    assert report.ok, report.damage
