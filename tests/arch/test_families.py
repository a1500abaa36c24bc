"""Families whose blocks differ from Llama's: read whole, rescaled without a trace, and compiled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from tests.support.families import ALIKE, BY_SCRIPT
from tests.support.family_checks import (
    compiled,
    compiled_and_loaded,
    every_linear_is_one,
    every_tensor_has_one_place,
    logits,
    logits_of_transformers,
    no_fold_changes_what_a_block_computes,
    streamed,
)
from tests.support.tiny_models import MORE_TYPES

TinyModel = Callable[..., Path]

MINICPM = {"attention_multiplier": 0.25}
"""What tiny Granite says otherwise: heads of 16 channels."""


@pytest.mark.parametrize("model_type", [name for name in MORE_TYPES if name not in BY_SCRIPT])
def test_a_family_is_mapped_whole_and_compiled(
    model_type: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model(model_type)
    source = open_source(folder)
    every_tensor_has_one_place(source, folder)
    stream = streamed(source)
    every_linear_is_one(source, stream)
    with stream.logits() as head:
        ours = torch.stack([head(hidden) for hidden in stream.hidden])
    torch.testing.assert_close(ours, logits_of_transformers(folder))
    no_fold_changes_what_a_block_computes(source, stream)
    if model_type not in ALIKE:
        compiled_and_loaded(source, ours, tmp_path, {"rtn": {"bits": 8, "group_size": 8}})


@pytest.mark.parametrize(
    "model_type",
    [
        "cohere",
        "qwen3_5_moe_text",
        "glm_moe_dsa shared",
        "gpt_oss",
        "granitemoehybrid",
        "olmo_hybrid",
    ],
)
def test_scales_are_searched_in_every_shape_of_block(
    model_type: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = open_source(tiny_model(model_type))
    compiled_and_loaded(source, logits(source), tmp_path, {"awq": {"bits": 8, "group_size": 8}})


def test_floats_stay_in_the_stack_they_came_in(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    output = tmp_path / "out"
    compiled(model, output, [{"rtn": {"bits": 8, "group_size": 8, "targets": ["attn.*"]}}])
    (before,) = (load_file(path) for path in model.glob("*.safetensors"))
    (after,) = (load_file(path) for path in output.glob("*.safetensors"))
    experts = {name for name in before if ".experts." in name}
    assert experts and all(torch.equal(before[name], after[name]) for name in experts)


def test_experts_stacked_on_disk_are_those_that_are_not(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A slice of a stack without `.weight` in its name gives the bytes of a tensor of its own."""
    model = tiny_model("qwen2_moe")
    stacked = tmp_path / "stacked"
    shutil.copytree(model, stacked)
    source = open_source(model)
    state = {
        n: t for n, t in load_file(model / "model.safetensors").items() if ".experts." not in n
    }
    for unit in source.layout.blocks:
        built = source.arch.runtime.block_state(unit, source.read_unit(unit).tensors)
        state |= {f"{unit.name}.{n}": t for n, t in built.items() if ".experts." in n}
    save_file(state, stacked / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    step = [{"awq": {"bits": 8, "group_size": 8}}]
    compiled(model, tmp_path / "one", step)
    compiled(stacked, tmp_path / "two", step)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("model_type", "twin"), [("kimi_k2", "deepseek_v3"), ("minicpm", "granite")]
)
def test_types_that_transformers_lacks_run_through_their_twins(
    model_type: str, twin: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tmp_path / model_type
    shutil.copytree(tiny_model(twin), folder)
    config = json.loads((folder / "config.json").read_text())
    if model_type == "minicpm":  # tiny Granite's multipliers in MiniCPM's words
        for key in ("embedding", "residual", "attention"):
            del config[f"{key}_multiplier"]
        depth = 0.5 * config["num_hidden_layers"] ** 0.5
        config |= {"scale_emb": 3, "scale_depth": depth, "dim_model_base": 16}
        del config["logits_scaling"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    own = tiny_model(twin) if model_type == "kimi_k2" else tiny_model(twin, **MINICPM)
    source, other = open_source(folder), open_source(own)
    assert source.layout.units == other.layout.units
    torch.testing.assert_close(logits(source), logits(other))


@pytest.mark.parametrize("model_type", ["kimi_k2", "kimi_k25"])
def test_kimi_s_int4_experts_are_read_moved_and_rounded_anew(
    model_type: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As Moonshot publishes them: packed in groups of 32, all else left alone by patterns; K2.5
    with another prefix and a tower of remote code."""
    step = {"rtn": {"bits": 4, "group_size": 32, "targets": ["expert.*"]}}
    twin = compiled(tiny_model("deepseek_v3"), tmp_path / "twin", [step])
    folder = tmp_path / "kimi"
    shutil.copytree(tmp_path / "twin", folder, ignore=shutil.ignore_patterns("*.index.json"))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "kimi_k2"
    quantization = config.pop("quantization_config")
    ignored = [r"re:.*self_attn.*", r"re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down)_proj.*"]
    quantization["ignore"] = ["re:.*lm_head", *ignored, "re:vision_tower.*", "re:mm_projector.*"]
    tensors = load_file(folder / "model.safetensors")
    if model_type == "kimi_k25":
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["vision_tower.encoder.blocks.0.wqkv.weight"] = torch.ones(96, 32)
        tensors["mm_projector.proj.0.weight"] = torch.ones(64, 32)
        config = {"model_type": model_type, "text_config": config}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    assert {x.role for x in source.layout.linears if x.beside} <= {
        "tower.linear",
        "projector.linear",
    }
    text = [unit for unit in source.layout.units if unit.kind != "beside"]
    for ours, theirs in zip(text, twin.layout.units, strict=True):
        one, two = source.read_unit(ours), twin.read_unit(theirs)
        assert len(one.quantized) == len(two.quantized)
        for (name, q), (other, expected) in zip(
            one.quantized.items(), two.quantized.items(), strict=True
        ):
            assert name.endswith(other) and torch.equal(q.codes, expected.codes)
    if source.arch.twin is not None:
        assert torch.equal(logits(source), logits(twin))
    run = CliRunner().invoke(
        cli, ["convert", str(folder), str(tmp_path / "dense"), "--format", "dense"]
    )
    assert run.exit_code == 0, run.output
    recipe = {
        "model": str(folder),
        "output": str(tmp_path / "out"),
        "dequantize_source": True,
        "passes": [{"mxfp4": {"targets": ["expert.*"]}}],
    }
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    run = CliRunner().invoke(cli, ["run", str(tmp_path / "r.json"), "--device", "cpu"])
    assert run.exit_code == 0, run.output


def test_what_is_carried_is_listed_and_nothing_turns_around_it(tiny_model: TinyModel) -> None:
    source = open_source(tiny_model("qwen3_vl"))
    notes = "; ".join(source.checkpoint.notes)
    assert (
        f"{len(source.layout.carried)} tensors are carried over as they are: model.visual" in notes
    )
    assert "calibration and evaluation are of text" in notes
    recipe = make_recipe({"model": "m", "output": "o", "passes": ["rotate", "rtn"]})
    with pytest.raises(InputError, match=r"carried over .* not rotated"):
        make_plan(recipe, source)


def test_contradictions_between_config_and_files_are_named(tiny_model: TinyModel) -> None:
    source = open_source(tiny_model("granitemoe"))
    config, entries = source.checkpoint.config, source.checkpoint.entries
    headers = {name: entry.spec.shape for name, entry in entries.items()}
    stacks = [name for unit in source.layout.blocks for name in unit.stacks]
    headers = {n: shape for n, shape in headers.items() if ".experts." not in n}
    headers |= {name: (4, 192, 64) if "input" in name else (4, 64, 96) for name in stacks}
    layout = source.arch.layout
    assert layout(config, headers).linears
    with pytest.raises(InputError, match=r"disagree on the shape of .*input_linear"):
        layout({**config, "num_local_experts": 5}, headers)
    with pytest.raises(InputError, match=r"disagree on the shape of .*input_linear"):
        layout(config, {**headers, stacks[0]: (4, 64, 192)})
    with pytest.raises(InputError, match=r"lacks .*experts\.0\.w1"):
        layout(config, {n: s for n, s in headers.items() if n != stacks[0]})
