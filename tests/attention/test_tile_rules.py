"""Rules that choose tiles of a prompt, in evaluations and in a running transformers model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.attention.evaluation import policy_attention
from compressor.attention.forms import policy_forms
from compressor.attention.policy import (
    AttentionPolicy,
    LayerPolicy,
    check_policy,
    describe,
    make_policy,
    policy_files,
)
from compressor.attention.rule import Rule
from compressor.attention.rules.blasst import Blasst, SkipPhase
from compressor.attention.rules.moba import MoBABlocks
from compressor.attention.rules.pillar import Pillar
from compressor.attention.rules.xattention import XAttention
from compressor.attention.serve.attach import attach
from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.evaluate.perplexity import evaluate
from tests.support.evaluated import evaluated_logits
from tests.support.tiny_models import build

RULES = {
    "xattention": XAttention(threshold=(0.3, 0.6, 0.5, 0.4), block_size=16, stride=4),
    "xattention as released": XAttention(
        threshold=(0.3, 0.3, 0.5, 0.2), block_size=16, stride=4, as_released=True
    ),
    "moba": MoBABlocks(block_size=8, top_k=3),
    "blasst": Blasst(
        prefill=SkipPhase(a=45.0, b=1.0, sparsity=0.7, lengths=(64, 128)),
        decode=SkipPhase(a=90.0, b=0.0, sparsity=0.5, lengths=(64, 128)),
        rows=16,
        keys=16,
    ),
}


def policy(*rules: Rule) -> AttentionPolicy:
    kind = LayerPolicy(rules=rules)
    return AttentionPolicy(heads=4, kv_heads=2, layers=(kind, kind))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids(length: int = 100) -> torch.Tensor:
    return torch.randint(2, 256, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", RULES)
def test_a_running_model_attends_as_an_evaluation_does(folder: Path, name: str) -> None:
    rules = policy(RULES[name])
    model = load(folder)
    plain = model(ids()).logits
    attach(model, rules)
    want = evaluated_logits(folder, rules, ids())
    whole = model(ids(), use_cache=False).logits
    torch.testing.assert_close(whole, want, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(whole, plain, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["xattention", "moba"])
def test_chunks_of_whole_blocks_give_what_one_pass_does(folder: Path, name: str) -> None:
    model = load(folder)
    runtime = attach(model, policy(RULES[name]))
    whole = model(ids(), use_cache=False).logits
    for lengths in ([48, 16, 36], [16, 80, 4], [32, 32, 32, 4], [96, 4]):
        options = runtime.options()
        parts = [model(part, **options).logits for part in ids().split(lengths, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "rule", [RULES["xattention"], RULES["moba"], Pillar(min_budget=4)], ids=lambda rule: rule.kind
)
def test_steps_after_a_prompt_in_chunks_are_those_after_a_whole_one(
    folder: Path, rule: Rule
) -> None:
    model = load(folder)
    runtime = attach(model, policy(rule))
    given = []
    for lengths in ([96, *[1] * 4], [32, 64, *[1] * 4]):
        options = runtime.options()
        parts = [model(part, **options).logits for part in ids().split(lengths, dim=1)]
        given.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(given[0], given[1], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_convolved_keys_in_every_phase(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for layer in range(2):
        weight = torch.randn(32, 1, 3, generator=generator)
        tensors[f"model.layers.{layer}.self_attn.k_conv.weight"] = weight
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole_blocks = MoBABlocks(block_size=8, top_k=99, convolution=True)
    rules = policy(whole_blocks)
    for name, content in policy_files(rules).items():
        (tmp_path / name).write_bytes(content)
    want = evaluated_logits(tmp_path, rules, ids())
    model = load(tmp_path)
    plain = model(ids()).logits
    options = attach(model).options()
    parts = [model(part, **options).logits for part in ids().split([50, *[1] * 50], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(want, plain, atol=1e-2)


def test_a_policy_is_stored_described_and_checked(folder: Path) -> None:
    layout = open_source(folder).layout
    for rule in RULES.values():
        stored = make_policy(policy(rule).to_json())
        assert stored == policy(rule)
        check_policy(stored, layout)
    assert "tiles of 16" in describe(policy(RULES["xattention"]))[0]
    data = policy(RULES["xattention"]).to_json()
    data["layers"][1]["xattention"]["threshold"] = [0.5]
    with pytest.raises(InputError, match="layer 1: xattention has 1 thresholds for 4 query heads"):
        make_policy(data)
    with pytest.raises(ValueError, match="not a shortest and a longest"):
        SkipPhase(a=1.0, b=1.0, sparsity=0.5, lengths=(128, 64))
    with pytest.raises(ValueError, match="stride 3"):
        XAttention(threshold=(0.5,), stride=3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["xattention", "blasst"])
def test_texts_past_the_calibrated_length_are_refused_by_name(folder: Path, name: str) -> None:
    """At load, when a prompt comes, and in evaluations; what grows past it is not lost."""
    rule = RULES[name].model_copy(update={"calibrated": 128} if name == "xattention" else {})
    rules, model = policy(rule), load(folder)
    message = f"{name}: a text of 130 tokens is longer than the 128"
    with pytest.raises(InputError, match=message):
        attach(model, rules, length=130)
    runtime = attach(model, rules, length=128)
    options = runtime.options()
    model(ids(128), **options)
    if name == "blasst":  # which has a threshold for steps, too
        with pytest.warns(UserWarning, match="grown past the 128"):
            model(ids(1), **options)
    with pytest.raises(InputError, match=message):
        model(ids(130), use_cache=False)
    runtime.detach()
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(InputError, match=message):
        evaluate(open_source(folder), ids(130), attention=policy_attention(rules), **where)


def test_a_form_without_a_word_for_a_rule_is_refused() -> None:
    forms = policy_forms()
    stored = forms["config"](policy(RULES["blasst"]), {}, model="m")["config.json"]
    (group,) = json.loads(stored)["sparse_attention_config"]["config_groups"].values()
    assert group["threshold_scale_factor"]["prefill"] == {"a": 45.0, "b": 1.0}
    for form, name, message in (
        ("config", "moba", "no runtime reads moba"),
        ("duo-attention", "xattention", "no word for xattention"),
        ("lserve", "blasst", "one choice of pages"),
    ):
        with pytest.raises(InputError, match=message):
            forms[form](policy(RULES[name]), {}, model="m")
