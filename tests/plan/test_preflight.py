"""What a run would die of in transformers is said before it begins, by one error each."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.errors import CompressError, InputError, Problems
from compressor.plan.preflight import check_model
from compressor.runner import tokenizer as tokenizers
from compressor.runner.tokenizer import load_tokenizer
from tests.support.tiny_models import TYPES


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture_passes(model_type: str, tiny_model: Callable[..., Path]) -> None:
    check_model(open_source(tiny_model(model_type)))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "evil"},
        {"rms_norm_eps": "1e-5"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}},
        {"pad_token_id": 10**9},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["evil", "evil"]},
        {"max_position_embeddings": 0.5},
        {"attention_dropout": []},
        {"num_hidden_layers": 2.0},
    ],
    ids=str,
)
def test_values_that_transformers_refuses(changes: dict[str, Any], model: Path) -> None:
    edit(model, **changes)
    with pytest.raises((InputError, Problems)) as refused:
        check_model(open_source(model))
    assert "config.json" in str(refused.value)


def test_missing_and_extra_biases_are_named(model: Path) -> None:
    edit(model, attention_bias=True)
    with pytest.raises(CompressError, match=r"self_attn\.k_proj\.bias"):
        check_model(open_source(model))
    edit(model, attention_bias=False)
    file = model / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        down = f"model.layers.{layer}.mlp.down_proj"
        tensors[f"{down}.bias"] = torch.ones(tensors[f"{down}.weight"].shape[0])
    save_file(tensors, file)
    with pytest.raises(CompressError, match=r"mlp\.down_proj\.bias"):
        check_model(open_source(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": {"type": "Evil"}},
        {"pre_tokenizer": {"type": "ByteLevel"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "y"}},
        {"model": {"type": "NewerBPE"}},
        {"model": []},
    ],
    ids=str,
)
def test_tokenizers_that_do_not_load_or_panic(changes: dict[str, Any], model: Path) -> None:
    edit(model, "tokenizer.json", **changes)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(model)


def test_a_tokenizer_whose_expression_backtracks(model: Path) -> None:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    edit(model, "tokenizer.json", pre_tokenizer={**split, "pattern": {"Regex": "(a+)+[bc]"}})
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot tokenize a text"):
        load_tokenizer(model)
    assert time.monotonic() - started < 20


def test_a_chat_template_that_comes_to_no_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 0.5)
    found = load_tokenizer(model)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    found.wrapped.chat_template = loop
    with pytest.raises(InputError, match=r"chat template .* no end after"):
        found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
