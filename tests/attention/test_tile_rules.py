"""Rules that choose tiles of a prompt, in evaluations and in a running transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.attention.evaluation import policy_attention
from compressor.attention.policy import (
    AttentionPolicy,
    LayerPolicy,
    check_policy,
    describe,
    make_policy,
)
from compressor.attention.rule import Rule
from compressor.attention.rules.blasst import Blasst, SkipPhase
from compressor.attention.rules.xattention import XAttention
from compressor.attention.serve.attach import attach
from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.runner.sweep import StreamedModel, run_blocks
from tests.support.tiny_models import build

RULES = {
    "xattention": XAttention(threshold=(0.3, 0.6, 0.5, 0.4), block_size=16, stride=4),
    "xattention as released": XAttention(
        threshold=(0.3, 0.3, 0.5, 0.2), block_size=16, stride=4, as_released=True
    ),
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
    (stream,) = run_blocks(
        [StreamedModel(open_source(folder), policy_attention(rules))],
        ids(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    with stream.logits() as logits:
        want = torch.stack([logits(hidden) for hidden in stream.hidden])
    whole = model(ids(), use_cache=False).logits
    torch.testing.assert_close(whole, want, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(whole, plain, atol=1e-2)


@torch.no_grad()
def test_chunks_of_whole_blocks_give_what_one_pass_does(folder: Path) -> None:
    model = load(folder)
    runtime = attach(model, policy(RULES["xattention"]))
    whole = model(ids(), use_cache=False).logits
    options = runtime.options()
    parts = [model(part, **options).logits for part in ids().split([48, 16, 36], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-4, rtol=1e-3)


def test_a_policy_is_stored_described_and_checked(folder: Path) -> None:
    layout = open_source(folder).layout
    for rule in RULES.values():
        stored = make_policy(policy(rule).to_json())
        assert stored == policy(rule)
        check_policy(stored, layout)
    assert "tiles of 16" in describe(policy(RULES["xattention"]))[0]
    short = RULES["xattention"].model_copy(update={"threshold": (0.5,)})
    with pytest.raises(InputError, match="1 thresholds for 4 query heads"):
        check_policy(policy(short), layout)
    with pytest.raises(ValueError, match="stride 3"):
        XAttention(threshold=(0.5,), stride=3)
