"""Names under which runtimes look linears up: those they make one of, those they leave alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.arch.load import known_model_types, load_map
from compressor.checkpoint.source import open_source
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.report.inspect import stored_form
from compressor.runtimes.contract import load_contract, parse_runtime
from compressor.runtimes.loads import loads
from tests.support.family_checks import compiled, logits, logits_of_transformers

FUSED = load_contract("vllm").fused
TYPES = {t: name for row in FUSED.classes for name, types in row.models.items() for t in types}

MAPPERS = {
    "llava": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
    "qwen2_5_vl": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    },
    "qwen3_vl": {
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
    },
    "nemotron_h": {"backbone": "model"},
}
"""hf_to_vllm_mapper of the model classes in vLLM 0.24, prefixes alone."""


def test_the_table_is_of_maps_that_there_are() -> None:
    assert len(TYPES) > 55 and TYPES.keys() <= set(known_model_types())


@pytest.mark.parametrize("model_type", TYPES)
def test_a_map_fuses_what_vllm_does(model_type: str) -> None:
    version = next(v for v in ("0.33", "0.24") if FUSED.of(model_type, v))
    theirs = {frozenset(parts): name for name, parts in FUSED.of(model_type, version).items()}
    arch = load_map(model_type)
    for section in (*arch.attention, *arch.mlp):
        rows = [row for row in section.linears if "{e}" not in row.name]
        ours: dict[str, set[str]] = {}
        for row in rows:
            if row.fused:
                ours.setdefault(row.fused, set()).add(row.name)
        for module, names in ours.items():
            parent, _, leaf = module.rpartition(".")
            assert {name.rpartition(".")[0] for name in names} == {parent}
            parts = {name.rpartition(".")[2] for name in names}
            assert any(parts <= known and leaf == name for known, name in theirs.items()), module
        for known, name in theirs.items():
            for parent in {row.name.rpartition(".")[0] for row in rows}:
                there = {f"{parent}.{leaf}" for leaf in known} & {row.name for row in rows}
                assert len(there) < 2 or there == ours.get(f"{parent}.{name}"), (parent, name)


@pytest.mark.parametrize("model_type", MAPPERS)
def test_what_is_left_alone_goes_by_every_name_that_loaders_have(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    source = open_source(tiny_model(model_type))
    step = {"rtn": {"bits": 8, "group_size": 8, "targets": ["*.o_proj"]}}
    plan = make_plan(make_recipe({"model": "m", "output": "o", "passes": [step]}), source)
    ignored = set(plan.target.config()["quantization_config"]["ignore"])

    def in_vllm(name: str) -> str:
        for old, new in MAPPERS[model_type].items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        return name

    theirs = {in_vllm(name) for name in ignored}
    runtime = source.arch.runtime
    for unit in source.layout.blocks:
        for linear in unit.linears:
            mixer = linear.name.removeprefix(f"{unit.name}.")
            if linear.expert is None and not mixer.endswith("o_proj"):
                inner = "" if model_type == "nemotron_h" else "language_model."
                assert f"{inner}model.layers.{unit.index}.{mixer}" in theirs
                assert f"{runtime.layers}.{unit.index}.{mixer}" in ignored


def test_nemotron_h_with_some_linears_packed_is_right_in_transformers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    step = {"rtn": {"bits": 8, "group_size": 8, "targets": ["mlp.*", "shared.*", "expert.*"]}}
    written = compiled(tiny_model("nemotron_h"), tmp_path / "out", [step])
    assert not loads(parse_runtime("transformers"), stored_form(written))
    theirs = logits_of_transformers(written.checkpoint.folder)
    torch.testing.assert_close(logits(written), theirs, atol=2e-4, rtol=2e-4)


def test_fused_linears_that_are_not_alike_are_refused_after_the_fact(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Some other tool packed q and left k alone."""
    step = {"rtn": {"bits": 8, "group_size": 32, "targets": ["attn.*"]}}
    written = compiled(tiny_model("llama"), tmp_path / "out", [step])
    assert not loads(parse_runtime("vllm"), stored_form(written))
    name = "model.layers.0.self_attn.k_proj"
    state = written.checkpoint.read(list(written.checkpoint.entries))
    state = {n: t for n, t in state.items() if not n.startswith(f"{name}.")}
    state |= open_source(tiny_model("llama")).checkpoint.read([f"{name}.weight"])
    (tmp_path / "out/model.safetensors.index.json").unlink()
    save_file(state, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["ignore"].append(name)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    (found,) = loads(parse_runtime("vllm"), stored_form(open_source(tmp_path / "out")))
    assert "makes one qkv_proj of q_proj, k_proj, v_proj" in found.message
