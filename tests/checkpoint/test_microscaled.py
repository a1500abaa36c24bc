"""MXFP4 and MXFP8 of gpt-oss, ModelOpt and MiniMax are codes that are read, cast and moved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.checkpoint.find import locate
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Problems
from compressor.ir.qtensor import MXFP4, MXFP8, NVFP4
from compressor.numerics import quantize
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.convert import convert
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.verify import verify
from tests.support.family_checks import logits, logits_of_transformers
from tests.support.golden_files import vectors

TinyModel = Callable[..., Path]


def rewritten(model: Path, folder: Path, change: Any, declared: dict[str, Any]) -> Path:
    shutil.copytree(model, folder)
    save_file(change(load_file(model / "model.safetensors")), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = declared
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def gpt_oss(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose experts are those of published vectors, in every block."""
    golden = vectors("formats/gptoss_mxfp4")
    kinds = ("blocks", "scales", "bias")
    stored = [f"{name}_{kind}" for name in ("gate_up_proj", "down_proj") for kind in kinds]

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {n: t for n, t in tensors.items() if ".experts." not in n}
        for block in (0, 1):
            at = f"model.layers.{block}.mlp.experts."
            kept |= {at + name: golden[name].clone() for name in stored}
        return kept

    model = tiny_model("gpt_oss", num_local_experts=3, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("mx") / "gpt_oss"
    return rewritten(model, folder, change, {"quant_method": "mxfp4"})


def test_experts_of_gpt_oss_are_codes(gpt_oss: Path) -> None:
    golden = vectors("formats/gptoss_mxfp4")
    source = open_source(gpt_oss)
    expected = {
        "gate_proj": golden["gate_proj_out_in"],
        "up_proj": golden["up_proj_out_in"],
        "down_proj": golden["down_dequant_bf16"].transpose(1, 2),
    }
    for unit in source.layout.blocks:
        found = source.read_unit(unit)
        assert len(found.quantized) == 9
        for name, q in found.quantized.items():
            expert, part = name.split(".")[-2:]
            assert q.spec == MXFP4
            assert torch.equal(q.dequantize(torch.bfloat16), expected[part][int(expert)])
        bias = found.tensors[f"{unit.name}.mlp.experts.1.up_proj.bias"]
        assert torch.equal(bias, golden["gate_up_proj_bias"][1, 1::2])


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt-nvfp4", "gpt-oss"])
def test_they_are_moved_without_a_change(format: str, gpt_oss: Path, tmp_path: Path) -> None:
    convert(locate(str(gpt_oss), fetch=True), tmp_path / "out", format=format)
    before, after = open_source(gpt_oss), open_source(tmp_path / "out")
    for unit in before.layout.blocks:
        ours, theirs = before.read_unit(unit), after.read_unit(after.layout.unit(unit.index + 1))
        assert ours.quantized.keys() == theirs.quantized.keys()
        for name, q in theirs.quantized.items():
            assert q.spec.element == "fp4_e2m1"
            assert q.spec == (NVFP4 if format == "modelopt-nvfp4" else MXFP4)
            assert torch.equal(q.dequantize(), ours.quantized[name].dequantize())


def test_its_own_names_come_back_to_the_byte(gpt_oss: Path, tmp_path: Path) -> None:
    """By way of compressed-tensors, one expert at a time, and verified there and back."""
    there, back = tmp_path / "there", tmp_path / "back"
    for source, output, format in (
        (gpt_oss, there, "compressed-tensors"),
        (there, back, "gpt-oss"),
    ):
        found = locate(str(source), fetch=True)
        made = convert(found, output, format=format, verifying=True)
        assert made.ok, [c for c in made.verified.checks if not c.ok]
    before, after = (load_file(folder / "model.safetensors") for folder in (gpt_oss, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((back / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4" and "lm_head" in config["modules_to_not_convert"]


def test_experts_rounded_here_load_in_transformers_under_their_own_names(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 96, "hidden_size": 64}
    model = tiny_model("gpt_oss", dtype=torch.bfloat16, **sizes)
    recipe = {
        "model": str(model),
        "output": str(tmp_path / "out"),
        "format": "gpt-oss",
        "calibration": {"samples": 4, "length": 32},
        "passes": [{"mxfp4": {"targets": ["expert.*"]}}],
    }
    cpu = choose_device("cpu")
    written = open_source(compile_checkpoint(prepare(make_recipe(recipe), device=cpu)).output)
    assert written.format.name == "gpt-oss"
    theirs = logits_of_transformers(tmp_path / "out")
    torch.testing.assert_close(logits(written), theirs, atol=2e-4, rtol=2e-4)
    assert verify(tmp_path / "out", against=open_source(model), device=cpu).ok
    wrong = {**recipe, "passes": ["mxfp4"]}
    with pytest.raises(Problems, match=r"nothing else is: .*self_attn.q_proj is quantized"):
        make_plan(make_recipe(wrong), open_source(model))
    llama = tiny_model("llama")
    with pytest.raises(Problems, match=r"those of gpt_oss's experts, not of llama"):
        make_plan(make_recipe({**wrong, "model": str(llama)}), open_source(llama))


def test_they_are_rounded_anew_with_consent(gpt_oss: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(gpt_oss),
        "output": str(tmp_path / "out"),
        "passes": [{"rtn": {"bits": 8, "group_size": 32}}],
    }
    with pytest.raises(InputError, match="is already quantized"):
        prepare(make_recipe(recipe), device=choose_device("cpu"))
    made = prepare(make_recipe({**recipe, "dequantize_source": True}), device=choose_device("cpu"))
    source = open_source(compile_checkpoint(made).output)
    specs = {n: s.weight for n, s in source.schemes.linears.items() if ".experts." in n}
    assert len(specs) == 18 and all(spec is not None and spec.bits == 8 for spec in specs.values())


def test_stacks_without_scales_are_refused(gpt_oss: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(gpt_oss, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"down_proj_blocks .* and its scales are not uint8"):
        open_source(folder)


@pytest.mark.parametrize(
    ("declared", "spec", "leaf"),
    [
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, MXFP8, "weight_scale"),
        ({"quant_method": "modelopt", "quant_algo": "mxfp4"}, MXFP4, "weight_scale"),
        ({"quant_method": "mxfp8", "ignored_layers": ["lm_head"]}, MXFP8, "weight_scale_inv"),
    ],
)
def test_others_names_for_the_same_codes(
    declared: dict[str, Any], spec: Any, leaf: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    wanted = {}

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [n for n in tensors if "_proj.weight" in n]:
            path, q = name.removesuffix(".weight"), quantize(tensors[name].float(), spec)
            wanted[path] = q
            low, high = q.codes[:, ::2].view(torch.uint8), q.codes[:, 1::2].view(torch.uint8)
            packed = low | high << 4 if spec == MXFP4 else q.codes.view(torch.float8_e4m3fn)
            tensors |= {name: packed.contiguous(), f"{path}.{leaf}": q.scales.view(torch.uint8)}
        return tensors

    folder = rewritten(tiny_model("llama"), tmp_path / "m", change, declared)
    source = open_source(folder)
    for unit in source.layout.blocks:
        for name, q in source.read_unit(unit).quantized.items():
            assert torch.equal(q.dequantize(), wanted.pop(name).dequantize())
    assert not wanted
