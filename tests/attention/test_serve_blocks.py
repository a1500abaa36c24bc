"""Chosen blocks in a running transformers model, with a cache or without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.attention.policy import AttentionPolicy, LayerPolicy, policy_files
from compressor.attention.rule import Rule
from compressor.attention.rules.lserve import LServePages
from compressor.attention.rules.streaming import StreamingHeads
from compressor.attention.serve.attach import attach
from compressor.errors import InputError
from tests.support.block_cases import SELECTIONS, with_forecasts
from tests.support.evaluated import evaluated_logits
from tests.support.tiny_models import build


def policy(*rules: Rule) -> AttentionPolicy:
    kind = LayerPolicy(rules=rules)
    return AttentionPolicy(heads=4, kv_heads=2, layers=(kind, kind))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_forecasts(build("llama", tmp_path_factory.mktemp("llama")))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids(length: int = 75) -> torch.Tensor:
    return torch.randint(2, 256, (2, length), generator=torch.Generator().manual_seed(1))


def attached(folder: Path, tmp_path: Path, rules: AttentionPolicy) -> Any:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, content in policy_files(rules).items():
        (tmp_path / name).write_bytes(content)
    model = load(tmp_path)
    return model, attach(model)


@torch.no_grad()
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_running_model_attends_as_an_evaluation_does(
    folder: Path, tmp_path: Path, name: str
) -> None:
    rules = policy(SELECTIONS[name])
    model, _ = attached(folder, tmp_path, rules)
    want = evaluated_logits(folder, rules, ids())
    whole = model(ids(), use_cache=False).logits
    torch.testing.assert_close(whole, want, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(whole, load(folder)(ids()).logits, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", SELECTIONS)
def test_steps_over_a_cache_give_what_one_pass_does(
    folder: Path, tmp_path: Path, name: str
) -> None:
    model, runtime = attached(folder, tmp_path, policy(SELECTIONS[name]))
    whole = model(ids(), use_cache=False).logits
    options = runtime.options()
    parts = [model(part, **options).logits for part in ids().split([40, 20, *[1] * 15], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_choices_that_last_for_steps(folder: Path, tmp_path: Path, per: Any) -> None:
    """Steps from the first token on give what an evaluation does, which chooses for each token as
    its step would; a prompt is attended to whole, and streaming heads stand beside."""
    pages = LServePages(
        block_size=8, logical=2, top_k=3, reuse=3, init_blocks=0, local_blocks=0, per=per
    )
    rules = policy(pages, StreamingHeads(heads=(0,), sinks=1, window=9))
    model, runtime = attached(folder, tmp_path, rules)
    want = evaluated_logits(folder, rules, ids())
    options = runtime.options()
    steps = [model(part, **options).logits for part in ids().split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), want, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_streaming_heads_beside_blocks(folder: Path, tmp_path: Path) -> None:
    held = StreamingHeads(heads=(0,), sinks=1, window=9)
    model, runtime = attached(folder, tmp_path, policy(SELECTIONS["forecast"], held))
    whole = model(ids(), use_cache=False).logits
    options = runtime.options()
    parts = [model(part, **options).logits for part in ids().split([50, *[1] * 25], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_generation(folder: Path, tmp_path: Path) -> None:
    model, runtime = attached(folder, tmp_path, policy(SELECTIONS["forecast"]))
    out = model.generate(ids(), max_new_tokens=6, do_sample=False, **runtime.options())
    assert out.shape == (2, 81)
    runtime.detach()
    assert torch.equal(model(ids()).logits, load(folder)(ids()).logits)


@torch.no_grad()
def test_short_texts_are_attended_to_whole(folder: Path, tmp_path: Path) -> None:
    dense = SELECTIONS["infllm"].model_copy(update={"dense_below": 76})
    model, _ = attached(folder, tmp_path, policy(dense))
    plain = load(folder)(ids()).logits
    torch.testing.assert_close(model(ids(), use_cache=False).logits, plain, atol=1e-4, rtol=1e-3)


def test_a_policy_without_its_forecasts_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="forecast"):
        attach(load(folder), policy(SELECTIONS["forecast"]))
