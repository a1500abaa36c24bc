"""Self-speculative decoding in a running transformers model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.attention.policy import AttentionPolicy, LayerPolicy
from compressor.attention.rules.pillar import Pillar
from compressor.attention.rules.streaming import StreamingHeads
from compressor.attention.serve.attach import attach
from compressor.attention.serve.speculate import speculate
from compressor.errors import InputError
from tests.support.tiny_models import build

PILLAR = Pillar(stride=4, ratio=0.05, min_budget=12)


def policy(*rules: Any) -> AttentionPolicy:
    layer = LayerPolicy(rules=rules)
    return AttentionPolicy(heads=4, kv_heads=2, layers=(layer, layer))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = build("llama", tmp_path_factory.mktemp("llama"))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(2, 256, (rows, 120), generator=torch.Generator().manual_seed(5))


def test_greedy_tokens_are_those_of_dense_decoding(model: Any) -> None:
    plain = model.generate(ids(), max_new_tokens=40, do_sample=False, eos_token_id=None)
    runtime = attach(model, policy(PILLAR))
    found = speculate(runtime, ids(), max_new_tokens=40, stride=4)
    runtime.detach()
    assert torch.equal(found.ids, plain)
    assert sum(found.rounds) >= 39 and 0 <= found.kept < 4


def test_a_stop_token_ends_the_text(model: Any) -> None:
    plain = model.generate(ids(), max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    stop = int(plain[126])
    runtime = attach(model, policy(PILLAR))
    found = speculate(runtime, ids(), max_new_tokens=40, stride=4, stop=[stop]).ids[0]
    runtime.detach()
    end = plain[120:].tolist().index(stop) + 121
    assert torch.equal(found, plain[:end])


def test_what_cannot_be_taken_back_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="2 rows"):
        speculate(attach(model, policy(PILLAR)), ids(2), max_new_tokens=4, stride=2)
    runtime = attach(model, policy(PILLAR, StreamingHeads(heads=(0,), sinks=1, window=9)))
    with pytest.raises(InputError, match="cannot take tokens back"):
        speculate(runtime, ids(), max_new_tokens=9, stride=2)
    runtime.detach()


@pytest.mark.parametrize(
    "wrong",
    [{"stride": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan}],
)
def test_numbers_that_say_nothing_are_refused(wrong: dict[str, Any], model: Any) -> None:
    options = {"stride": 2, "max_new_tokens": 3, **wrong}
    with pytest.raises(InputError, match="nothing can be drafted"):
        speculate(attach(model, policy(PILLAR)), ids(), **options)
