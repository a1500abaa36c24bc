"""Families whose blocks differ from Llama's: read whole, rescaled without a trace, and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.checkpoint.source import Source, open_source
from compressor.numerics.folding import fold
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.sweep import Stream, StreamedModel, floats, run_blocks
from tests.support.tiny_models import MORE_TYPES

CPU = choose_device("cpu")
IDS = torch.randint(2, 256, (2, 48), generator=torch.Generator().manual_seed(1))
TinyModel = Callable[..., Path]


def streamed(source: Source) -> Stream:
    (stream,) = run_blocks([StreamedModel(source)], IDS, device=CPU, dtype=torch.float32)
    return stream


def logits(source: Source) -> Tensor:
    stream = streamed(source)
    with stream.logits() as head:
        return torch.stack([head(hidden) for hidden in stream.hidden])


@torch.no_grad()
def logits_of_transformers(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def compiled(model: Path, output: Path, passes: list[Any]) -> Source:
    recipe = make_recipe(
        {
            "model": str(model),
            "output": str(output),
            "calibration": {"samples": 8, "length": 32},
            "passes": passes,
        }
    )
    return open_source(compile_checkpoint(prepare(recipe, device=CPU)).output)


@pytest.mark.parametrize("model_type", MORE_TYPES)
def test_every_tensor_has_one_place(model_type: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(model_type)
    source = open_source(folder)
    placed = [name for unit in source.layout.units for name in source.names(unit)]
    assert len(placed) == len(set(placed))
    weights = sum(math.prod(source.checkpoint.entries[name].spec.shape) for name in placed)
    stored = [load_file(path) for path in folder.glob("*.safetensors")]
    assert weights == sum(t.numel() for tensors in stored for t in tensors.values())


@pytest.mark.parametrize("model_type", MORE_TYPES)
def test_blocks_compute_what_transformers_computes(model_type: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(model_type)
    torch.testing.assert_close(logits(open_source(folder)), logits_of_transformers(folder))


@pytest.mark.parametrize("model_type", MORE_TYPES)
def test_no_fold_changes_what_a_block_computes(model_type: str, tiny_model: TinyModel) -> None:
    source = open_source(tiny_model(model_type))
    runner = streamed(source).runner
    hidden = runner.embed(floats(source.read_unit(source.layout.embedding), runner), IDS)
    generator = torch.Generator().manual_seed(3)
    for unit in source.layout.blocks:
        tensors = floats(source.read_unit(unit), runner)
        with runner.block(unit, tensors) as block:
            expected = block.forward(hidden)
        assert unit.folds
        for how in unit.folds:
            source_weight = tensors[f"{how.source}.weight"]
            channels = how.rows.total if how.rows else source_weight.shape[0]
            scale = torch.rand(channels, generator=generator) * 1.5 + 0.5
            changed = fold(tensors, how, unit, scale, dtype=torch.float64)
            with runner.block(unit, {**tensors, **changed}) as block:
                found = block.forward(hidden)
            where = f"{unit.name}: {how.source} into {how.site}"
            assert (found - expected).abs().max() < 2e-5 * expected.abs().max(), where
        hidden = expected
