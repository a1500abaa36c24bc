"""A policy is held against what the recipe beside it makes, and a recipe of others is no crash."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from compressor.checkpoint.manifest import RECIPE_NAME
from compressor.checkpoint.source import Source, open_source
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.compare_policy import policy_problems


@pytest.fixture()
def original(tiny_model: Callable[..., Path]) -> Source:
    return open_source(tiny_model("llama"))


@pytest.fixture()
def output(original: Source, tmp_path: Path) -> Path:
    recipe = {
        "model": str(original.checkpoint.folder),
        "output": str(tmp_path / "out"),
        "passes": [{"streaming": {"sinks": 2, "window": 8}}],
        "format": "dense",
        "verify": False,
    }
    return compile_checkpoint(prepare(make_recipe(recipe), device=choose_device("cpu"))).output


def test_it_is_what_the_passes_make(output: Path, original: Source) -> None:
    written = open_source(output)
    assert policy_problems(output, original, written)[0] == []
    recipe = yaml.safe_load((output / RECIPE_NAME).read_text())
    recipe["passes"][0]["streaming"]["window"] = 9
    (output / RECIPE_NAME).write_text(yaml.safe_dump(recipe))
    problems, _ = policy_problems(output, original, written)
    assert len(problems) == len(original.layout.units) - 2
    assert f"is not what the passes of {RECIPE_NAME} make" in problems[0]


@pytest.mark.parametrize(
    "text",
    ["- a", "passes: 3", "passes: [3]", "passes: [{streaming: 3}]", "a: [", "{}", "\x00",
     "passes: [{streaming: {sinks: none}}]", "passes: [{nothing: {}}]", "passes: [{3: {}}]"],
)  # fmt: skip
def test_a_recipe_of_others_is_said(text: str, output: Path, original: Source) -> None:
    (output / RECIPE_NAME).write_text(text)
    problems, _ = policy_problems(output, original, open_source(output))
    assert len(problems) == 1 and "cannot be compared" in problems[0]
