"""The script that measures the low-bit methods: outliers change nothing, rows are recipes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.methods.base import pass_names
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure" / "low_bit.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_low_bit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_low_bit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt"])
def test_planted_outliers_change_no_bit(
    model_type: str, script: ModuleType, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(model_type, dtype=torch.bfloat16)
    script.plant_outliers(folder, tmp_path / "planted")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (folder, tmp_path / "planted")
    ]
    ids = torch.arange(2, 40)[None]
    a, b = (model(ids).logits for model in models)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    before, after = (
        model.get_parameter(
            "model.layers.1.input_layernorm.weight"
            if model_type != "opt"
            else "model.decoder.layers.1.self_attn_layer_norm.weight"
        )
        for model in models
    )
    assert int((after == before * script.FACTOR).sum()) == script.CHANNELS


def test_every_row_plans(script: ModuleType, tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("llama", hidden_size=128, intermediate_size=256))
    names = [row.name for row in script.rows_of(64)]
    assert len(set(names)) == len(names)
    assert {name for pair in script.CLAIMS for name in pair} <= set(names)
    for row in script.rows_of(64):
        steps = [entry if isinstance(entry, str) else next(iter(entry)) for entry in row.passes]
        assert set(steps) <= set(pass_names())
        if steps:
            data = {"model": "m", "output": "o", "passes": list(row.passes), "format": row.format}
            make_plan(make_recipe(data), source)


def test_a_difference_is_in_standard_errors(script: ModuleType) -> None:
    windows = {"kl": [0.0] * 4}
    found = {
        "int4 gptq": {"nll": [1.0, 2.0, 3.0, 4.0], **windows},
        "int4 rtn": {"nll": [1.1, 2.1, 3.1, 4.1], **windows},
        "int3 gptq": {"nll": [1.0, 2.0, 3.0, 4.0], **windows},
        "int3 rtn": {"nll": [1.5, 1.5, 3.5, 3.6], **windows},
    }
    four, three = script.compare(found)
    assert four["nll"][0] == pytest.approx(0.1) and four["nll"][2] == "better"
    assert three["nll"][2] == "none"
