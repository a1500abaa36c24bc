"""Runs that learn rounding by gradients, and what is left of one that was stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import make_tokens
from transformers import AutoTokenizer

from compressor.checkpoint.source import open_source
from compressor.errors import Interrupted
from compressor.evaluate.perplexity import token_scores
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.sweep import StreamedModel, run_blocks

RECONSTRUCT = {
    "reconstruct": {"bits": 3, "group_size": 32, "preset": "fast", "batch": 4, "held_back": 4}
}
SIGNROUND = {"signround": {"bits": 3, "group_size": 32, "steps": 6, "batch": 4, "rate": 0.1}}


AFTER_ROTATE = ["rotate", RECONSTRUCT]
AFTER_AWQ = ["awq", {"gptq": {"bits": 3, "group_size": 32, "correction": 0.5}}]


def run(model: Path, output: Path, *passes: Any, **how: Any) -> dict[str, bytes]:
    data = {
        "model": str(model),
        "output": str(output),
        "calibration": {"data": "bundled/prose", "samples": 8, "length": 32},
        "passes": list(passes),
        "untie": "rotate" in passes,
    }
    compile_checkpoint(prepare(make_recipe(data), device=choose_device("cpu")), **how)
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


def divergence(model: Path, out: Path) -> float:
    """KL of a checkpoint to its model, on text of the kind that was calibrated, but held out."""
    text = read_documents("bundled/prose", part="held_out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = make_tokens(tokenizer, text, samples=8, length=32, sampling="consecutive", seed=0).ids
    models = [StreamedModel(open_source(folder)) for folder in (model, out)]
    how: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "batch": 8}
    states = run_blocks(models, ids, **how)
    counted = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    _, _, kl, _ = token_scores([states[1], states[0]], ids, counted)
    return float(kl.mean())


@pytest.mark.parametrize("passes", [[SIGNROUND], [RECONSTRUCT], AFTER_ROTATE])
def test_a_stopped_run_continues_to_the_same_bytes(
    passes: list[Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    told: list[tuple[str, int, int, float]] = []
    whole = run(model, tmp_path / "whole", *passes, on_fit=lambda *found: told.append(found))
    blocks = [f"model.layers.{i}" for i in range(3)]
    assert list(dict.fromkeys(name for name, *_ in told)) == blocks
    assert all(done < total and loss > 0 for _, done, total, loss in told)
    fits: list[str] = []
    with pytest.raises(Interrupted):  # in the middle of the second block
        run(
            model,
            tmp_path / "stopped",
            *passes,
            on_fit=lambda name, *_: fits.append(name),
            stopping=lambda: blocks[1] in fits,
        )
    fits.clear()
    again = run(model, tmp_path / "stopped", *passes, on_fit=lambda name, *_: fits.append(name))
    assert again == whole
    assert blocks[0] not in fits and blocks[1] in fits


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_mixtures_of_experts_are_fitted_as_they_route(
    model_type: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(model_type)
    ((name, given),) = RECONSTRUCT.items()
    kl = {}
    for step in ({name: {**given, "min_tokens": 8}}, {"rtn": {"bits": 3, "group_size": 32}}):
        out = tmp_path / next(iter(step))
        data = {
            "model": str(model),
            "output": str(out),
            "calibration": {"data": "bundled/prose", "samples": 16, "length": 32},
            "passes": [step],
        }
        done = compile_checkpoint(prepare(make_recipe(data), device=choose_device("cpu")))
        kl[out.name] = divergence(model, out)
        if out.name == "rtn":
            continue
        fits = [row for unit in done.units for row in unit.rows if "loss_of_start" in row]
        assert len(fits) == 2 and all(row["loss"] <= row["loss_of_start"] for row in fits)
        source, written = open_source(model), open_source(out)
        for a, b in zip(source.layout.units, written.layout.units, strict=True):
            one, two = source.read_unit(a).dequantized(), written.read_unit(b).dequantized()
            routers = [x.weight_name for x in a.linears if x.role == "router"]
            assert all(torch.equal(one[n], two[n]) for n in routers)
    assert kl[name] < kl["rtn"]


@pytest.mark.parametrize("passes", [AFTER_ROTATE, AFTER_AWQ, ["awq", RECONSTRUCT]])
def test_the_original_runs_in_the_basis_and_scales_of_what_is_rounded(
    passes: list[Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A correction towards another model's activations would destroy the weights."""
    model = tiny_model("llama", num_hidden_layers=3)
    ((name, given),) = passes[-1].items()
    errors = []
    for strength in (0.0, 0.5):
        out = tmp_path / f"{strength}"
        run(model, out, *passes[:-1], {name: {**given, "correction": strength}})
        errors.append(divergence(model, out))
    assert errors[1] < 1.1 * errors[0]
