"""A drafted map says of a known family what its own map says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from compressor.checkpoint.find import locate
from compressor.checkpoint.reader import open_checkpoint
from compressor.cli.main import cli
from compressor.errors import InputError
from compressor.plan.recipe import make_recipe
from compressor.run.session import compile_checkpoint, prepare
from tests.support.family_checks import marks_of_an_equal_draft, said


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", "cohere", "olmo2", "nemotron", "phi3", "qwen3_moe", "qwen2_moe"],
)
def test_a_draft_is_the_family_s_own_map(family: str, tiny_model: Callable[..., Path]) -> None:
    # Of phi3 it is marked that its rows are q, k and v in this order.
    assert marks_of_an_equal_draft(open_checkpoint(tiny_model(family))) == (family == "phi3")


def test_a_model_inside_another_is_said_to_be_so(tiny_model: Callable[..., Path]) -> None:
    result = CliRunner().invoke(cli, ["map", "draft", str(tiny_model("llava"))])
    assert isinstance(result.exception, InputError)
    assert "llava holds a text model, llama, inside" in result.exception.message
    assert "text: {model_type: llama" in str(result.exception.hint)


def test_what_is_not_certain_is_marked_and_the_command_prints_a_map(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    result = CliRunner().invoke(cli, ["map", "draft", str(tiny_model("mixtral"))])
    assert result.exit_code == 0
    assert "# Unsure: what 'model.layers.0.block_sparse_moe.gate.weight' is called" in result.output
    result = CliRunner().invoke(cli, ["map", "draft", str(tiny_model("qwen3"))])
    assert "# Unsure" not in result.output
    (tmp_path / "my.yaml").write_text(result.output)
    chosen = str(tmp_path / "my.yaml")
    source = locate(str(tiny_model("qwen3")), fetch=False, chosen=chosen).source
    assert said(source.layout) == said(locate(str(tiny_model("qwen3")), fetch=False).source.layout)


@pytest.mark.parametrize(
    ("passes", "format"),
    [
        ([{"rtn": {"bits": 4, "group_size": 32, "symmetric": False}}], "compressed-tensors"),
        ([{"rtn": {"bits": 4, "group_size": 32}}], "gptq"),
        ([{"awq": {"bits": 4, "group_size": 32, "symmetric": False}}], "autoawq"),
        ([{"fp8": {}}], "compressed-tensors"),
        ([{"mxfp4": {}}, {"kv_cache": {"element": "fp8"}}], "compressed-tensors"),
    ],
)
def test_a_quantized_model_gives_the_map_of_its_original(
    passes: list[Any], format: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    drafted = []
    recipe = {
        "model": str(tiny_model("qwen3")),
        "output": str(tmp_path / "out"),
        "passes": passes,
        "format": format,
        "calibration": {"samples": 2, "length": 32},
        "verify": False,
        "report": False,
    }
    output = compile_checkpoint(prepare(make_recipe(recipe), device=torch.device("cpu"))).output
    for folder in (recipe["model"], output):
        result = CliRunner().invoke(cli, ["map", "draft", str(folder)])
        assert result.exit_code == 0, result.exception
        drafted.append(result.output)
    assert drafted[0] == drafted[1]
