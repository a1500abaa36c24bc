"""InfLLM's memory in evaluations and in a running transformers model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.attention.evaluation import policy_attention
from compressor.attention.policy import AttentionPolicy, LayerPolicy, describe, make_policy
from compressor.attention.rules.infllm_memory import MEMORY, InfLLMMemory
from compressor.attention.serve.attach import attach
from compressor.checkpoint.source import open_source
from compressor.runner.sweep import StreamedModel, run_blocks
from tests.support.tiny_models import build

RULE = InfLLMMemory(
    init=4, local=16, block=4, top_k=3, representatives=2, piece=8, cached=5, decay=0.1
)


def policy(rule: InfLLMMemory) -> AttentionPolicy:
    layer = LayerPolicy(rules=(rule,))
    return AttentionPolicy(heads=4, kv_heads=2, positions="slot", layers=(layer, layer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids(length: int = 88) -> torch.Tensor:
    return torch.randint(2, 256, (2, length), generator=torch.Generator().manual_seed(1))


def evaluated(folder: Path, rule: InfLLMMemory) -> torch.Tensor:
    (stream,) = run_blocks(
        [StreamedModel(open_source(folder), policy_attention(policy(rule)))],
        ids(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    with stream.logits() as logits:
        return torch.stack([logits(hidden) for hidden in stream.hidden])


@torch.no_grad()
@pytest.mark.parametrize("by_head", [False, True])
def test_chunks_give_what_an_evaluation_does(folder: Path, by_head: bool) -> None:
    rule = RULE.model_copy(update={"by_head": by_head})
    model = load(folder)
    plain = model(ids()).logits
    runtime = attach(model, policy(rule))
    options = runtime.options()
    parts = [model(part, **options).logits for part in ids().split([40, 48], dim=1)]
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found, evaluated(folder, rule), atol=3e-4, rtol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-2)
    (cache,) = options.values()
    (memory, _) = cache.layers[0].held[0].memory[MEMORY]
    assert memory.caches[0].loaded >= 3 and len(memory.caches[0].held) <= 5
    assert model(ids()[:, :1], **options).logits.isfinite().all()


@torch.no_grad()
def test_a_text_within_the_window_is_attended_to_whole(folder: Path) -> None:
    plain = load(folder)(ids()).logits
    found = evaluated(folder, RULE.model_copy(update={"local": 88}))
    torch.testing.assert_close(found, plain, atol=2e-4, rtol=1e-3)


def test_it_is_stored_described_and_checked() -> None:
    assert make_policy(policy(RULE).to_json()) == policy(RULE)
    assert "look up 3 blocks of 4" in describe(policy(RULE))[0]
    for wrong, message in (
        ({"piece": 17}, "longer than the window"),
        ({"representatives": 5}, "cannot stand"),
        ({"cached": 2}, "do not hold"),
    ):
        with pytest.raises(ValueError, match=message):
            InfLLMMemory.model_validate({**RULE.model_dump(), **wrong})
