"""What is in a checkpoint, told from headers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from compressor.checkpoint.find import locate
from compressor.checkpoint.safetensors import read_tensor
from compressor.cli.main import cli
from compressor.plan.recipe import make_recipe
from compressor.report.inspect import inspect
from compressor.run.session import choose_device, compile_checkpoint, prepare

TYPES = ("llama", "qwen2", "gemma", "phi3", "opt", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "dense"])
def test_it_counts_the_parameters_of_the_model(
    model_type: str, format: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(model_type, dtype=torch.float16)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    recipe = {
        "model": str(model),
        "output": str(tmp_path / "out"),
        "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
        "format": format,
    }
    compile_checkpoint(prepare(make_recipe(recipe), device=choose_device("cpu")))
    info = inspect(locate(str(tmp_path / "out"), fetch=False))
    # A tied head is one parameter; what a file of a tied model repeats is none.
    assert info.parameters == sum(p.numel() for p in loaded.parameters())
    assert info.model_type == model_type and info.format == format
    sizes = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert sizes * 0.8 < info.nbytes < sizes
    packed = [layer for layer in info.layers if layer.scheme.startswith("int4 by groups of 32")]
    assert bool(packed) == (format != "dense")
    for layer in packed:
        # Half a word for the code, and float16 for a scale of 32; GPTQ stores zero points too.
        assert 4.5 <= layer.bits_per_weight < 6
    assert info.about is not None and info.about["recipe"]["format"] == format


def test_no_weight_is_read(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("compressor.checkpoint.reader.read_tensor", refuse)
    assert read_tensor is not refuse
    runner = CliRunner()
    done = runner.invoke(cli, ["inspect", str(tiny_model("qwen2")), "--layers"])
    assert done.exit_code == 0, done.output
    assert "lm_head shares model.embed_tokens.weight" in done.stdout
    assert "model.layers.1.mlp.down_proj" in done.stdout
    as_json = json.loads(runner.invoke(cli, ["inspect", str(tiny_model("qwen2")), "--json"]).stdout)
    assert as_json["ok"] is True and as_json["tied"] == "model.embed_tokens.weight"
    assert len(as_json["layers"]) == 15
