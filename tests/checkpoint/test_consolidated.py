"""Mistral's own files are the same model as the Hugging Face ones."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.errors import InputError
from tests.support.family_checks import compiled, logits

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    r"model\.(layers\.\d+)\.self_attn\.([qkvo])_proj": r"\1.attention.w\2",
    r"model\.(layers\.\d+)\.input_layernorm": r"\1.attention_norm",
    r"model\.(layers\.\d+)\.post_attention_layernorm": r"\1.ffn_norm",
    r"model\.(layers\.\d+)\.mlp\.gate_proj": r"\1.feed_forward.w1",
    r"model\.(layers\.\d+)\.mlp\.down_proj": r"\1.feed_forward.w2",
    r"model\.(layers\.\d+)\.mlp\.up_proj": r"\1.feed_forward.w3",
    r"model\.(layers\.\d+)\.block_sparse_moe\.(gate|experts\..*)": r"\1.feed_forward.\2",
}


def as_mistral_publishes(folder: Path, to: Path, **changed: Any) -> Path:
    """The same model in Mistral's own files: RoPE there turns neighbours, here halves."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        path = name.removesuffix(".weight")
        pattern = next(p for p in NAMES if re.fullmatch(p, path))
        theirs = re.fullmatch(pattern, path).expand(NAMES[pattern])
        if theirs.endswith(("wq", "wk")):
            count = heads if theirs.endswith("wq") else kv
            order = torch.arange(dim).view(2, dim // 2).T.reshape(-1)
            tensor = tensor.view(count, dim, -1)[:, order].reshape(tensor.shape)
        state[f"{theirs}.weight"] = tensor.contiguous()
    to.mkdir()
    save_file(state, to / "consolidated.safetensors")
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": dim,
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": kv,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "max_position_embeddings": config["max_position_embeddings"],
        **({"sliding_window": config["sliding_window"]} if "sliding_window" in config else {}),
    }
    if "num_local_experts" in config:
        params["moe"] = {
            "num_experts": config["num_local_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
        }
    (to / "params.json").write_text(json.dumps({**params, **changed}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, to / name)
    return to


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_consolidated_files_are_their_twin(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    twin = tiny_model(family)
    folder = as_mistral_publishes(twin, tmp_path / "own")
    ours, theirs = open_source(folder), open_source(twin)
    assert ours.layout == theirs.layout
    for unit in ours.layout.units:
        read = ours.read_unit(unit).tensors
        for name, tensor in theirs.read_unit(unit).tensors.items():
            assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype, name
    torch.testing.assert_close(logits(ours), logits(theirs), atol=0, rtol=0)
    step = [{"gptq": {"bits": 4, "group_size": 32}}]
    compiled(folder, tmp_path / "one", step)
    compiled(twin, tmp_path / "two", step)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    verified = CliRunner().invoke(cli, ["verify", str(tmp_path / "one"), "--against", str(folder)])
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"vision_encoder": {"hidden_size": 8}}, "a vision tower is not read"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantized already"),
        ({"new_trick": 2}, "'new_trick', of which is not known"),
        ({"n_kv_heads": 4}, "rows, params.json says"),
        ({"dim": None}, "lacks dim"),
        ({"n_layers": 3}, "lacks"),
        ({"hidden_dim": 95}, "disagree on the shape"),
    ],
)
def test_what_is_not_such_a_model_is_refused(
    changed: dict[str, Any], says: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = as_mistral_publishes(tiny_model("mistral"), tmp_path / "own", **changed)
    with pytest.raises(InputError, match=says):
        open_source(folder)


def test_hugging_face_files_come_first(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = as_mistral_publishes(tiny_model("mistral"), tmp_path / "own")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model("mistral") / name, folder / name)
    notes = open_source(folder).checkpoint.notes
    assert any("left out: consolidated.safetensors" in note for note in notes)
