"""What is no part of the text model: read by no forward pass, and held against the original."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.reader import open_checkpoint
from compressor.checkpoint.source import as_source, open_source
from compressor.plan.estimate import estimate
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.session import compile_checkpoint, prepare
from compressor.runner.source_model import SourceModel
from compressor.verify.verify import verify

CPU = torch.device("cpu")
TinyModel = Callable[..., Path]


def recipe(model: Path, output: Path) -> dict[str, object]:
    passes = [{"rtn": {"bits": 8, "group_size": 32}}]
    return {"model": str(model), "output": str(output), "passes": passes}


def test_a_tower_is_held_against_the_original(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    source = open_source(model)
    carried = source.layout.carried
    assert carried
    model_of = SourceModel(source, device=CPU, dtype=torch.float32)
    for index, unit in enumerate(source.layout.units):
        assert not model_of.read_unit(index).extra, "no forward pass uses it"
        assert bool(unit.carried) == (unit.kind == "beside")
    made = make_recipe(recipe(model, tmp_path / "out"))
    output = compile_checkpoint(prepare(made, device=CPU)).output
    assert verify(output, against=source, device=CPU).ok
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (path,) = other.glob("*.safetensors")
    tensors = load_file(path)
    name = next(n for n in tensors if n in carried)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    found = verify(output, against=open_source(other), device=CPU)
    assert not found.ok
    assert any(f"{name} is not the original's" in check.detail for check in found.checks)


def test_memory_is_planned_for_the_largest_unit_that_is_compared(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """An embedding is not packed, and yet both checkpoints' are there in float32."""
    model = tiny_model("llama", vocab_size=40_000)
    data = recipe(model, tmp_path / "out")
    embedding = 40_000 * 64

    def planned(verified: bool) -> int:
        plan = make_plan(make_recipe({**data, "verify": verified}), open_source(model))
        return estimate(plan, device=CPU, resident=0).host_bytes

    assert planned(True) - planned(False) >= (8 + 4) * embedding * 0.5
    assert planned(True) >= (4 + 4 + 4 + 4) * embedding


def test_a_stack_says_what_it_is_stored_as(tiny_model: TinyModel) -> None:
    stored = replace(open_checkpoint(tiny_model("gpt_oss")), stored_as="FP8 by blocks")
    source = as_source(stored)
    assert source.layout.blocks[0].stacks and source.low_precision == "FP8 by blocks"
    assert source.checkpoint.nbytes == stored.nbytes
