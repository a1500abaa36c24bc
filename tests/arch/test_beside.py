"""Linears of towers, projectors and layers for several tokens: left alone, or rounded by name."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from compressor.arch import free
from compressor.arch.beside import kind_of
from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import Problems
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.report.inspect import stored_form
from compressor.runtimes.contract import parse_runtime
from compressor.runtimes.loads import loads
from tests.support.family_checks import compiled, logits, logits_of_transformers

STEP = {"bits": 8, "group_size": 8}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "tower"),
        ("visual.merger.mlp.0.weight", "projector"),
        ("multi_modal_projector.linear_1.weight", "projector"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "tower"),
        ("model.audio_tower.layers.0.ffw.weight", "audio"),
        ("model.embed_vision.embedding_projection.weight", "projector"),
        ("mtp.layers.0.self_attn.q_proj.weight", "mtp"),
        ("model.layers.61.eh_proj.weight", "mtp"),
        ("model.mtp_block.0.mlp.up_proj.weight", "mtp"),
    ],
)
def test_a_part_is_told_by_its_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "qwen3_vl"])
def test_a_tower_is_rounded_where_a_recipe_names_it(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(family)
    roles = {x.role for x in open_source(model).layout.linears if x.beside}
    targets = ["linear", *roles]
    written = compiled(model, tmp_path / "out", [{"rtn": {**STEP, "targets": targets}}])
    source = open_source(model)
    beside = [x for x in source.layout.linears if x.beside]
    assert "tower.linear" in roles
    schemes = written.schemes.linears
    assert all(schemes[x.name].weight is not None for x in beside)
    theirs = logits_of_transformers(written.checkpoint.folder)
    torch.testing.assert_close(logits(written), theirs, atol=2e-4, rtol=2e-4)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loaded(input_ids=torch.zeros(1, 4, dtype=torch.long))  # decompresses
    state = loaded.state_dict()
    units = [unit for unit in written.layout.units if unit.kind == "beside"]
    ours = {n: q for unit in units for n, q in written.read_unit(unit).quantized.items()}
    assert ours.keys() == {x.name for x in beside}
    inner = source.arch.prefixes
    for linear in beside:
        names = [linear.name] + [a + linear.name.removeprefix(b) for a, b in inner.items()]
        (name,) = {n for n in names if f"{n}.weight" in state}
        torch.testing.assert_close(state[f"{name}.weight"], ours[linear.name].dequantize())
    run = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--against", str(model)])
    assert run.exit_code == 0, run.output
    dense = tmp_path / "dense"
    run = CliRunner().invoke(
        cli, ["convert", str(tmp_path / "out"), str(dense), "--format", "dense"]
    )
    assert run.exit_code == 0, run.output
    floats = load_file(dense / "model.safetensors")
    for linear in beside:
        assert torch.equal(floats[linear.weight_name], ours[linear.name].dequantize())


def test_what_torch_multiplies_with_itself_stays_and_what_transformers_fails_on_is_said(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(tiny_model("gemma3"))
    names = {x.name for x in source.layout.linears if x.beside}
    assert "vision_tower.head.mlp.fc1" in names
    assert "vision_tower.head.attention.out_proj" not in names
    step = [{"rtn": {**STEP, "targets": ["linear", "tower.*"]}}]
    written = compiled(tiny_model("gemma3"), tmp_path / "out", step)
    (reason,) = loads(parse_runtime("transformers"), stored_form(written))
    assert "SigLIP" in reason.message
    found = loads(parse_runtime("vllm"), stored_form(written))
    (mlp,) = (error for error in found if "SigLIP" in error.message)
    assert ".fc" in mlp.message and "ignore" in str(mlp.hint)
    with pytest.raises(AttributeError, match="weight"):
        logits_of_transformers(written.checkpoint.folder)


def test_layers_for_several_tokens_are_units_of_their_own(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as a block, they are worked on some modules at a time, and written whole."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("glm4_moe"), model)
    tensors = load_file(model / "model.safetensors")
    last = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.")}
    mtp = {n.replace(".1.", ".2.", 1): t + 1 for n, t in last.items()}
    mtp |= {"model.layers.2.eh_proj.weight": torch.randn(64, 128)}
    save_file(tensors | mtp, model / "model.safetensors", metadata={"format": "pt"})
    whole = [u for u in open_source(model).layout.units if u.kind == "beside"]
    assert [u.name for u in whole] == ["model.layers"]
    monkeypatch.setattr(free, "UNIT", 2**13)
    source = open_source(model)
    assert [u.kind for u in source.layout.units][:4] == ["embedding", "block", "block", "head"]
    parts = source.layout.units[4:]
    assert len(parts) > 2 and set(source.layout.carried) == mtp.keys()
    modules = [{n.rpartition(".")[0].rpartition(".")[0] for n in u.carried} for u in parts]
    assert all(not one & other for one, other in pairwise(modules)), "what is fused is together"
    step = {"rtn": {**STEP, "targets": ["linear", "mtp.linear"]}}
    written = compiled(model, tmp_path / "out", [step])
    assert len(written.layout.units) == len(source.layout.units)
    packed = {x.name for x in written.layout.linears if x.role == "mtp.linear"}
    assert "model.layers.2.eh_proj" in packed
    assert all(written.schemes.linears[name].weight is not None for name in packed)
    run = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--against", str(model)])
    assert run.exit_code == 0, run.output
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--against", str(model)])
    assert run.exit_code == 1 and "is in one of the two alone" in run.output


@pytest.mark.parametrize(
    "step",
    [
        {"gptq": {**STEP, "targets": ["tower.*"]}},
        {"awq": {**STEP, "targets": ["linear", "tower.*"]}},
        {"rtn": {**STEP, "activations": "static", "targets": ["tower.*"]}},
    ],
)
def test_what_has_to_see_inputs_refuses_a_tower(
    step: dict[str, Any], tiny_model: Callable[..., Path]
) -> None:
    recipe = make_recipe({"model": "m", "output": "o", "passes": [step]})
    with pytest.raises(Problems, match=r"nothing runs \d+ linears \(vision_tower"):
        make_plan(recipe, open_source(tiny_model("llava")))


def test_patterns_that_do_not_name_a_tower_leave_it_alone(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("qwen2_5_vl"))
    for pattern in ("linear", "*down_proj", "*", r"re:.*", "mlp.*"):
        step = {"rtn": {**STEP, "targets": [pattern], "ignore": ["lm_head", "router"]}}
        plan = make_plan(make_recipe({"model": "m", "output": "o", "passes": [step]}), source)
        assert not any(x.beside for x in plan.passes[0].context.selected)
    step = {"rtn": {**STEP, "targets": ["tower.*"], "ignore": ["*.mlp.*"]}}
    plan = make_plan(make_recipe({"model": "m", "output": "o", "passes": [step]}), source)
    assert plan.passes[0].names and not any(".mlp." in name for name in plan.passes[0].names)


def test_inspect_lists_what_is_beside_the_text_model(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("qwen3_vl")
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(model), "--json"]).output)
    beside = {part["kind"]: part for part in found["beside"]}
    assert beside.keys() == {"tower", "projector"}
    stored = load_file(model / "model.safetensors")
    visual = {n: t for n, t in stored.items() if n.startswith("model.visual")}
    assert sum(part["tensors"] for part in beside.values()) == len(visual)
    assert sum(part["bytes"] for part in beside.values()) == sum(t.nbytes for t in visual.values())
    shown = CliRunner().invoke(cli, ["inspect", str(model)]).output
    assert "tower" in shown and "projector" in shown
