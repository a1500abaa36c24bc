"""Checkpoints of types that nobody has a map for: without one, or with one of the user's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compressor.arch import load as arch
from compressor.arch.free import lay_free
from compressor.checkpoint.find import locate
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Problems
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify import compare_outputs
from compressor.verify.verify import verify
from tests.support.family_checks import logits

CPU = choose_device("cpu")


@pytest.fixture(scope="module")
def novel(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts of a type that is not known."""
    folder = tmp_path_factory.mktemp("novel") / "model"
    shutil.copytree(tiny_model("qwen2_moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "novel_moe"}))
    return folder


def recipe_for(model: Path, output: Path, step: Any, *, map: str = "none", **more: Any) -> Any:
    data = {"model": {"path": str(model), "map": map}, "output": str(output), "passes": [step]}
    return make_recipe({**data, **more})


@pytest.mark.parametrize("step", [{"rtn": {"bits": 4, "group_size": 32}}, {"nvfp4": {}}])
def test_weights_are_rounded_without_a_map_and_proved(
    step: Any, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(novel, tmp_path / "out", step)
    output = compile_checkpoint(prepare(recipe, device=CPU)).output
    read: list[Path] = []
    monkeypatch.setattr(compare_outputs, "load_tokenizer", read.append)
    source = open_source(output)
    coded = {name for name, scheme in source.schemes.linears.items() if scheme.weight is not None}
    assert len(coded) == 38 and not any("gate.weight" in f"{name}.weight" for name in coded)
    assert verify(output, device=CPU, against=open_source_without_map(novel)).ok
    assert not read, "no block runs, so no text is read"
    before, after = (load_file(path / "model.safetensors") for path in (novel, output))
    kept = before.keys() & after.keys()
    assert {n for n in kept if "norm" in n or "embed" in n or ".gate." in n or "lm_head" in n}
    assert all(torch.equal(before[name], after[name]) for name in kept)


def open_source_without_map(folder: Path) -> Any:
    from compressor.checkpoint.find import locate

    return locate(str(folder), fetch=False, chosen="none").source


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion pipeline as diffusers lays it out, its transformer in shards."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    part = folder / "transformer"
    part.mkdir()
    (part / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    sizes = {
        "x_embedder": (64, 32),
        "time_text_embed.timestep_embedder.linear_1": (64, 32),
        "transformer_blocks.0.attn.to_q": (64, 64),
        "transformer_blocks.0.ff.net.0.proj": (96, 64),
        "transformer_blocks.0.norm1.linear": (192, 64),
        "norm_out.linear": (128, 64),
        "proj_out": (32, 64),
    }
    tensors = {f"{n}.weight": torch.randn(s, dtype=torch.bfloat16) for n, s in sizes.items()}
    tensors |= {"transformer_blocks.0.attn.norm_q.weight": torch.ones(32, dtype=torch.bfloat16)}
    names = sorted(tensors)
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part_of in zip(files, (names[:4], names[4:]), strict=True):
        save_file({name: tensors[name] for name in part_of}, part / file)
    index = {name: files[name not in names[:4]] for name in names}
    at = part / "diffusion_pytorch_model.safetensors.index.json"
    at.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_a_diffusion_transformer_keeps_its_layout(pipeline: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe = recipe_for(pipeline, output, {"rtn": {"bits": 8, "group_size": 32}})
    compile_checkpoint(prepare(recipe, device=CPU))
    source = open_source(output)
    coded = {name for name, scheme in source.schemes.linears.items() if scheme.weight is not None}
    block = "transformer_blocks.0"
    assert coded == {f"{block}.attn.to_q", f"{block}.ff.net.0.proj", f"{block}.norm1.linear"}
    single = "diffusion_pytorch_model.safetensors"
    files = {path.name for path in output.glob("*.safetensors*")}
    assert files == {single, f"{single}.index.json"}
    config = json.loads((output / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel" and "dtype" not in config
    original = open_source_without_map(pipeline)
    assert original.checkpoint.folder == pipeline / "transformer"
    assert verify(output, device=CPU, against=original).ok
    with pytest.raises(InputError, match=r"has no config\.json") as error:
        open_source(pipeline)
    assert "diffusion pipeline: model: {path: " in str(error.value.hint)


def test_what_has_to_run_the_model_says_that_it_cannot(novel: Path, tmp_path: Path) -> None:
    step = {"awq": {"bits": 4, "group_size": 32}}
    recipe = recipe_for(novel, tmp_path / "out", step, evaluate={})
    with pytest.raises(InputError) as error:
        make_plan(recipe, open_source_without_map(novel))
    said = str(error.value)
    assert "awq has to know how the model computes" in said
    assert "evaluate: a model without a map" in said


def test_an_unknown_type_names_the_nearest_map_and_the_ways_out(novel: Path) -> None:
    with pytest.raises(InputError, match="no architecture map for model_type 'novel_moe'") as error:
        open_source(novel)
    assert "the nearest is qwen2_moe" in str(error.value.hint)
    assert "map: none" in str(error.value.hint) and "map: my.yaml" in str(error.value.hint)


def test_a_map_of_the_user_s_own_is_a_file(novel: Path, tmp_path: Path) -> None:
    own = tmp_path / "my.yaml"
    own.write_text("same_as: qwen2_moe\ntwin: qwen2_moe\n")
    step = {"awq": {"bits": 8, "group_size": 8}}
    few = {"calibration": {"samples": 4, "length": 16}}
    recipe = recipe_for(novel, tmp_path / "out", step, map=str(own), **few)
    compiled = compile_checkpoint(prepare(recipe, device=CPU))
    assert {"weight_packed"} == {
        name.rpartition(".")[2]
        for name in load_file(compiled.output / "model.safetensors")
        if "experts.0.down_proj.weight_p" in name
    }
    own.write_text("same_as: no_such\n")
    with pytest.raises(InputError, match=r"my\.yaml is not a map: there is no map of 'no_such'"):
        prepare(recipe, device=CPU)


@pytest.mark.parametrize("key", ["layers", "embedding", "norm", "lm_head"])
def test_a_map_names_modules_that_the_model_has(
    key: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    data = yaml.safe_load((arch.MAPS / "llama.yaml").read_text())
    data["runtime"][key] += "x"
    own = tmp_path / "my.yaml"
    own.write_text(yaml.safe_dump(data))
    step = {"awq": {"bits": 4, "group_size": 32}}
    few = {"calibration": {"samples": 4, "length": 16}}
    recipe = recipe_for(tiny_model("llama"), tmp_path / "out", step, map=str(own), **few)
    with pytest.raises((InputError, Problems), match=rf"runtime\.{key}: .*x, Llama"):
        prepare(recipe, device=CPU)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("twin_config: [1]", "twin_config is not a mapping"),
        ("twin_config: {a: f(hidden_size)}", "is no arithmetic of keys"),
        ("twin_config: {a: 5}", "is no arithmetic of keys"),
        (f"twin_config: {{a: {'1 + ' * 99}1}}", "is no arithmetic of keys"),
        ("twin_config: {a: scale_emb}", "scale_emb is None, not a number"),
        ("twin_config: {a: hidden_size / 0}", "has no value: float division by zero"),
        ("twin_config: {a: (0 - hidden_size) ** 0.5}", "not a number|is .*j"),
        ("handed: [a]", "is not a map: handed"),
        ("handed: {a: b}", "is not a map: .*handed"),
        ("handed: {a: 1}", "map says handed: .* model.layers.0 gives 1 outputs"),
    ],
)
def test_what_a_map_says_of_its_twin_and_its_blocks_is_checked(
    said: str, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    own = tmp_path / "my.yaml"
    own.write_text(f"same_as: llama\n{said}\n")
    with pytest.raises(InputError, match=message):
        logits(locate(str(tiny_model("llama")), fetch=False, chosen=str(own)).source)


def test_packages_bring_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_maps"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "theirs.yaml").write_text("same_as: llama\n")
    meta = tmp_path / "their_maps-1.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: their-maps\nVersion: 1\n")
    (meta / "entry_points.txt").write_text("[compressor.maps]\ntheirs = their_maps\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arch._installed.cache_clear()
    try:
        assert arch.load_map("theirs").layer == arch.load_map("llama").layer
    finally:
        monkeypatch.undo()
        arch._installed.cache_clear()


def test_units_end_between_modules_and_keep_what_is_fused_together() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    size = (2**14, 2**14)
    headers = {f"layers.{i}.attn.{name}.weight": size for i in range(12) for name in names}
    headers |= {"embed.weight": (8, 4), "layers.0.router.weight": (4, 64), "time_in.weight": (2, 2)}
    layout = lay_free("dit", config={}, headers=headers)
    assert [unit.name for unit in layout.blocks] == [f"part.{i}" for i in range(13)]
    assert layout.embedding.tensors == ("embed.weight",)
    roles = {linear.name: linear.role for linear in layout.linears}
    assert roles["layers.0.router"] == roles["time_in"] == "router"
    for unit in layout.blocks:
        fused = {linear.fused for linear in unit.linears if linear.fused}
        assert sum(linear.fused in fused for linear in unit.linears) == 3 * len(fused)
    with pytest.raises(InputError, match="no tensor of this checkpoint looks like"):
        lay_free("none", config={}, headers={"a": (2,)})
