"""Every recipe of the repository plans on every tiny architecture that can take it, and runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.checkpoint.manifest import MANIFEST_NAME
from compressor.checkpoint.source import open_source
from compressor.errors import Problems
from compressor.methods.base import Method, get_pass
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.verify import verify
from tests.support.tiny_models import TYPES

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
CPU = choose_device("cpu")
# What a plan may say of a recipe on an architecture that it is not for.
UNFIT = ("does not commute with a rotation", "LayerNorm", "'mlp.down' matches no linear")


def method(entry: Any) -> Method:
    ((name, params),) = ({entry: {}} if isinstance(entry, str) else entry).items()
    return get_pass(name).model_validate(params or {})


def block_recipes() -> list[Path]:
    """Those that need no training: what is trained has tests of its own."""
    found = []
    for path in RECIPES:
        passes = yaml.safe_load(path.read_text("utf-8"))["passes"]
        names = [x if isinstance(x, str) else next(iter(x)) for x in passes]
        # Gates are trained on texts of thousands of tokens, which tiny models have no room for.
        if "duo_attention" in names:
            continue
        if all(method(entry).effects().works_on != "none" for entry in passes):
            found.append(path)
    return found


def small(path: Path, model: Path, output: Path, *, tied: bool, base: Path) -> dict[str, Any]:
    """The recipe for a tiny model: groups of 32, little text, nothing from the network."""
    data = yaml.safe_load(path.read_text("utf-8"))
    for entry in data["passes"]:
        for params in entry.values() if isinstance(entry, dict) else ():
            if (params or {}).get("group_size"):
                params["group_size"] = 32
            if (params or {}).get("base"):
                params["base"] = str(base)
            if (params or {}).get("steps"):
                params["steps"] = 2
            if (params or {}).get("preset"):
                params["preset"] = "fast"
            if (params or {}).get("pads"):
                params |= {"pads": [1, 0], "keep": 1}
                params["distill"]["steps"] = 2
    data["calibration"] = {"samples": 16, "length": 32}
    data["evaluate"] = {"windows": 2, "length": 32}
    if "audit" in data:
        data["audit"] |= {"tokens": 16, "contexts": 4, "length": 12}
    if "activation_store" in data:
        data["activation_store"] = str(output.parent / "activations")
    for key in ("gate", "publish"):
        data.pop(key, None)
    if tied and any("rotate" in str(x) or "qoq" in str(x) for x in data["passes"]):
        data["untie"] = True
    return {**data, "model": str(model), "output": str(output)}


@pytest.mark.parametrize("path", block_recipes(), ids=lambda path: path.stem)
def test_it_plans_on_every_architecture_it_is_for(
    path: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    planned = []
    for model_type in TYPES:
        source = open_source(tiny_model(model_type))
        base = tiny_model(model_type, seed=1)
        tied = source.layout.tied is not None
        data = small(path, tmp_path, tmp_path / "out", tied=tied, base=base)
        try:
            plan = make_plan(make_recipe(data), source)
        except Problems as error:
            assert all(any(u in p.message for u in UNFIT) for p in error.problems), error
            continue
        assert plan.shards.size > 0
        planned.append(model_type)
    mixtures = {"mixtral", "qwen3_moe"} if "mixed" in path.stem else set()
    assert set(planned) >= set(TYPES) - {"gemma2", "opt"} - mixtures


@pytest.mark.parametrize("path", block_recipes(), ids=lambda path: path.stem)
def test_what_it_writes_is_its_original(
    path: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen3" if "smollm2" in path.stem else "llama")
    base = tiny_model("qwen3" if "smollm2" in path.stem else "llama", seed=1)
    recipe = make_recipe(small(path, model, tmp_path / "out", tied=False, base=base))
    prepared = prepare(recipe, device=CPU)
    assert prepared.evaluation is not None
    done = compile_checkpoint(prepared)
    assert (done.output / MANIFEST_NAME).is_file()
    found = verify(
        done.output,
        base=prepared.base and prepared.base.source,
        against=prepared.located.source,
        device=CPU,
    )
    assert found.ok, found.damage
