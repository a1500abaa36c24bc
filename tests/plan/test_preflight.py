"""What a run would die of in transformers is said before it begins, by one error each."""

import json
import resource
import shutil
import threading
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
def test_tokenizers_that_do_not_load_or_panic(
    changes: dict[str, Any], model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(model, "tokenizer.json", **changes)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(model)
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_whose_expression_backtracks(model: Path) -> None:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    edit(model, "tokenizer.json", pre_tokenizer={**split, "pattern": {"Regex": "(a+)+[bc]"}})
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot tokenize a text"):
        load_tokenizer(model)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "no end after",
        ),
        ("{{ 'a' * 10 ** 12 }}", "takes more than"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}",
            "takes more than",
        ),
        ("{% for i in range(400) %}{{ 'a' * 99999 }}{% endfor %}", "makes 39999600 characters"),
    ],
    ids=["loops", "one string", "doubling", "long"],
)
def test_a_chat_template_is_bounded(
    template: str, message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 0.5 if "no end" in message else 60)
    found = load_tokenizer(model)
    found.wrapped.chat_template = template
    threads, limit = threading.active_count(), resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(InputError, match=rf"the chat template .* {message}"):
        found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads, "it still runs"
    found.wrapped.chat_template = "{{ messages[0].content }}"
    assert found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
