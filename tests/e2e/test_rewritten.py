"""rotate, reorder and smooth_attention through whole runs: the written model is the original."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.errors import Interrupted, Problems
from compressor.plan.recipe import Recipe
from compressor.run.judge import judge
from compressor.run.session import choose_device, compile_checkpoint, prepare
from tests.support.recipes import short_recipe

CPU = choose_device("cpu")
IDS = torch.arange(2, 42)[None]


def recipe(model: Path, output: Path, passes: list[Any], **top: Any) -> Recipe:
    return short_recipe(model, output, passes, **{"format": "dense", **top})


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Path:
    return compile_checkpoint(prepare(recipe(model, output, passes, **top), device=CPU)).output


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


STEPS = [{"rotate": {}}, {"reorder": {}}, {"smooth_attention": {}}]


@pytest.mark.parametrize(
    "model_type, passes, top",
    [
        ("llama", STEPS, {}),
        ("qwen2", STEPS, {"untie": True}),
        ("qwen3", [{"rotate": {"seed": 4}}, {"smooth_attention": {"alpha": 0.8}}], {}),
        ("opt", [{"rotate": {"keep_mean": True}}, *STEPS[1:]], {"untie": True}),
        ("mixtral", STEPS, {}),
    ],
)
def test_what_is_written_is_the_original(
    model_type: str,
    passes: list[Any],
    top: dict[str, Any],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = tiny_model(model_type)
    found = logits(run(model, tmp_path / "out", passes, **top))
    expected = logits(model)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("after", [1, 3])
def test_a_rotated_run_continues_where_it_stopped(
    after: int, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A resumed run makes its inputs from the rotated embedding and blocks that it wrote."""
    passes = [{"rotate": {}}, {"gptq": {"bits": 4, "group_size": 32}}]
    model, top = tiny_model("llama"), {"format": "compressed-tensors"}
    whole = run(model, tmp_path / "whole", passes, **top)
    calls = iter(range(100))
    prepared = prepare(recipe(model, tmp_path / "parts", passes, **top), device=CPU)
    with pytest.raises(Interrupted):
        compile_checkpoint(prepared, stopping=lambda: next(calls) >= after)
    parts = run(model, tmp_path / "parts", passes, **top)
    for shard in whole.glob("*.safetensors"):
        assert shard.read_bytes() == (parts / shard.name).read_bytes()


def test_plan_says_what_cannot_be_rotated(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    for model_type, passes, top, message in (
        ("qwen2", ["rotate"], {}, "lm_head, which shares its weight"),
        ("gemma2", ["rotate"], {"untie": True}, "does not commute"),
        ("opt", ["rotate"], {"untie": True}, "LayerNorm"),
        ("llama", ["reorder", "rotate"], {}, "which reorder sees"),
        ("afmoe", ["reorder"], {}, "a gate for each of its inputs"),
        ("qwen3_next", ["reorder"], {}, "a gate for each of its inputs"),
        ("llama", ["rotate"], {"propagate": "original"}, "basis of the hidden states"),
    ):
        with pytest.raises(Problems, match=message):
            run(tiny_model(model_type), tmp_path / "out", passes, **top)


def test_a_report_compares_no_hidden_states_of_two_bases(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The rotated model's perplexity is compared with the original's, its hidden states are not."""
    for passes, blocks in ((["rotate"], 0), (["reorder"], 2)):
        top = {"evaluate": {"windows": 2, "length": 32}, "verify": False}
        made = recipe(tiny_model("llama"), tmp_path / passes[0], passes, **top)
        prepared = prepare(made, device=CPU)
        found = judge(prepared, compile_checkpoint(prepared)).evaluation
        assert found is not None and found.kl is not None and found.kl.value < 1e-6
        assert len(found.blocks) == blocks
