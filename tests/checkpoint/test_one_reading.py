"""A folder that says two things is read as transformers and vLLM read it, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from tests.support.readings import logits, read
from tests.support.tiny_models import TYPES

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tiny_model, tmp_path):
    def make(model_type: str = "llama", **options: Any) -> Path:
        return Path(shutil.copytree(tiny_model(model_type, **options), tmp_path / "model"))

    return make


def edit(folder: Path, change=None, **config: Any) -> Path:
    """Change the tensors of a folder, and keys of its config."""
    if change is not None:
        tensors = change(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    data = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def index(folder: Path, shard: str) -> None:
    names = load_file(folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


def written(folder: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A folder that holds our reading under plain names, for a foreign reader."""
    out = Path(shutil.copytree(folder, tmp_path / "written"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def plan_config(folder: Path, tmp_path: Path, **recipe: Any) -> dict[str, Any]:
    """config.json as a run would write it."""
    given = {"passes": [{"rtn": {"bits": 8, "group_size": 32}}], **recipe}
    made = make_recipe({"model": str(folder), "output": str(tmp_path / "o"), **given})
    return make_plan(made, open_source(folder)).target.config()


def test_a_new_file_beside_an_old_index_is_refused_with_both_names(copy):
    folder = copy()
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    index(folder, "model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors, which.*index\.json with") as error:
        open_source(folder)
    assert "keep one" in (error.value.hint or "")
    (folder / "model.safetensors").unlink()
    assert not open_source(folder).checkpoint.notes


def test_the_same_tensors_in_a_second_file_are_refused_and_others_named(copy):
    folder = copy()
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00003.safetensors")
    with pytest.raises(InputError, match=r"two sets.*model-00002-of-00003\.safetensors"):
        open_source(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    save_file({"layers.0.wq": torch.ones(2)}, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (note,) = open_source(folder).checkpoint.notes
    assert "consolidated.safetensors, pytorch_model.bin" in note


def test_shards_that_the_index_does_not_name_are_left_out_and_named(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index(folder, "model-00001-of-00001.safetensors")
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder / "old-1.safetensors")
    assert "old-1.safetensors" in open_source(folder).checkpoint.notes[0]


def test_an_adapter_beside_a_model_is_refused(copy):
    folder = copy()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter") as error:
        open_source(folder)
    assert "merge_and_unload" in (error.value.hint or "")


def test_a_head_stored_under_a_tied_flag_is_the_embedding_or_refused(copy, tmp_path):
    folder = edit(
        copy(),
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
        tie_word_embeddings=True,
    )
    source = open_source(folder)
    assert source.layout.tied == "model.embed_tokens.weight"
    assert "lm_head.weight is the tied" in source.checkpoint.notes[0]
    assert plan_config(folder, tmp_path)["tie_word_embeddings"] is True
    assert plan_config(folder, tmp_path, untie=True)["tie_word_embeddings"] is False
    edit(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1e-3})
    with pytest.raises(InputError, match="transformers takes the stored one, vLLM") as error:
        open_source(folder)
    assert "tie_word_embeddings to false" in (error.value.hint or "")


def test_a_tied_model_that_stores_only_its_head(copy, tmp_path):
    folder = copy("qwen2")
    expected = logits(folder)
    edit(folder, lambda t: t | {"lm_head.weight": t.pop("model.embed_tokens.weight")})
    assert torch.equal(logits(folder), expected)
    assert torch.equal(logits(written(folder, read(folder), tmp_path)), expected)


@pytest.mark.parametrize(("model_type", "tied"), [("gemma", True), ("llama", False)])
def test_the_written_flag_says_what_is_written_also_by_default(copy, tmp_path, model_type, tied):
    folder = copy(model_type)
    data = json.loads((folder / "config.json").read_text())
    data.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(data))
    assert plan_config(folder, tmp_path).get("tie_word_embeddings") in (None, tied)
    assert plan_config(folder, tmp_path, untie=True).get("tie_word_embeddings") in (None, False)
    if tied:
        assert plan_config(folder, tmp_path, untie=True)["tie_word_embeddings"] is False


SHAPES = {
    "saved from the base class": lambda name: name.removeprefix("model."),
    "the prefix on every name": lambda name: "model." + name.removeprefix("model."),
}


@pytest.mark.parametrize("how", SHAPES)
@pytest.mark.parametrize("model_type", TYPES)
def test_prefixes_are_read_as_transformers_reads_them(copy, tmp_path, model_type, how):
    folder = copy(model_type)
    before = load_file(folder / "model.safetensors")
    expected = logits(folder)
    edit(folder, lambda tensors: {SHAPES[how](name): t for name, t in tensors.items()})
    assert torch.equal(logits(folder), expected)
    found = read(folder)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in found)
    if load_file(folder / "model.safetensors").keys() != before.keys():
        assert "have other prefixes" in open_source(folder).checkpoint.notes[-1]


@pytest.mark.parametrize(
    "shell", ["module.", "_orig_mod.", "base_model.model.", "language_model.", "transformer."]
)
def test_a_shell_around_the_whole_model_is_taken_off(copy, shell):
    folder = copy()
    before = load_file(folder / "model.safetensors")
    edit(folder, lambda tensors: {shell + name: t for name, t in tensors.items()})
    found = read(folder)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in found)


def test_one_tensor_under_two_names_is_refused(copy):
    folder = edit(copy(), lambda t: t | {"norm.weight": t["model.norm.weight"] + 1})
    with pytest.raises(InputError, match=r"model\.norm\.weight twice.* and as"):
        open_source(folder)


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",
        "v_head.summary.bias",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.attn.bias",
        "model.embeddings.position_ids",
    ],
)
def test_tensors_that_loaders_skip_are_left_out_and_named(copy, name):
    folder = copy()
    expected, before = logits(folder), load_file(folder / "model.safetensors")
    edit(folder, lambda tensors: tensors | {name: torch.ones(16)})
    assert torch.equal(logits(folder), expected)
    assert read(folder).keys() == before.keys()
    (note,) = open_source(folder).checkpoint.notes
    assert name in note


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
        ("visual.patch_embed.weight", "save_pretrained"),
        ("model.layers.0.self_attn.q_proj.qweight", "original"),
    ],
)
def test_other_tensors_are_refused_with_the_way_out(copy, name, hint):
    folder = edit(copy(), lambda tensors: tensors | {name: torch.ones(4, 4)})
    with pytest.raises(InputError, match="no place for 1 tensor") as error:
        open_source(folder)
    assert hint in (error.value.hint or "")


def biased(value: float):
    return lambda tensors: {
        **tensors,
        **{
            name.replace("weight", "bias"): torch.full_like(tensor[:, 0], value)
            for name, tensor in tensors.items()
            if tensor.dim() == 2 and "self_attn" in name
        },
    }


def test_zero_biases_that_the_config_does_not_announce_are_left_out(copy):
    folder = copy()
    expected = logits(folder)
    edit(folder, biased(0.0))
    assert torch.equal(logits(folder), expected)
    assert not any(name.endswith("bias") for name in read(folder))
    assert "7 more biases, all zero" in open_source(folder).checkpoint.notes[0]
    with pytest.raises(InputError, match=r"not zero.*has no such bias") as error:
        open_source(edit(folder, biased(0.5)))
    assert "attention_bias: true" in (error.value.hint or "")
    assert any(name.endswith("q_proj.bias") for name in read(edit(folder, attention_bias=True)))


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    ],
)
def test_a_declaration_over_plain_weights_goes(copy, tmp_path, declared):
    folder = edit(copy(), quantization_config=declared)
    source = open_source(folder)
    assert not source.quantized and "all tensors are plain floats" in source.checkpoint.notes[0]
    assert not plan_config(folder, tmp_path, passes=[{"smoothquant": {}}], format="dense").get(
        "quantization_config"
    )


def test_what_is_quantized_otherwise_is_refused_with_the_way_out(copy):
    folder = edit(
        copy(),
        lambda t: t | {"model.layers.0.mlp.up_proj.weight": torch.ones(3072, 1, dtype=torch.uint8)},
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    with pytest.raises(InputError, match="bitsandbytes") as error:
        open_source(folder)
    assert "dequantize()" in (error.value.hint or "")
