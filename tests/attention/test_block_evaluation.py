"""Blocks that a policy chooses, as evaluations run them block by block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.attention.evaluation import policy_attention, rule_call
from compressor.attention.key_blocks import KeyBlocks, recent_blocks
from compressor.attention.policy import AttentionPolicy, LayerPolicy, policy_files
from compressor.attention.rules.forecast import forecast_of
from compressor.attention.rules.streaming import StreamingHeads
from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.evaluate.perplexity import evaluate
from compressor.runner.sweep import StreamedModel, run_blocks
from tests.support.block_cases import SELECTIONS, with_forecasts
from tests.support.tiny_models import build


def policy(*rules: KeyBlocks | None, **change: Any) -> AttentionPolicy:
    layers = tuple(LayerPolicy(rules=(rule,) if rule else ()) for rule in rules)
    return AttentionPolicy(heads=4, kv_heads=2, layers=layers, **change)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_forecasts(build("llama", tmp_path_factory.mktemp("llama")))


def run(folder: Path, ids: torch.Tensor, rules: AttentionPolicy | None, *, batch: int = 8):
    attending = None if rules is None else policy_attention(rules)
    (stream,) = run_blocks(
        [StreamedModel(open_source(folder), attending)],
        ids,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch=batch,
    )
    return stream.hidden


def tokens(rows: int = 3, length: int = 90) -> torch.Tensor:
    return torch.randint(2, 256, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SELECTIONS)
def test_as_many_blocks_as_there_are_is_full_attention(model: Path, name: str) -> None:
    every = SELECTIONS[name].model_copy(update={"top_k": 12})
    out = run(model, tokens(), policy(every, every))
    torch.testing.assert_close(out, run(model, tokens(), None), atol=1e-5, rtol=1e-5)
    few = run(model, tokens(), policy(SELECTIONS[name], SELECTIONS[name]))
    assert not torch.allclose(few, out, atol=1e-2)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_query_sees_what_it_would_in_a_shorter_text(model: Path, name: str) -> None:
    """What is chosen for a token does not depend on the tokens after it; windows that hold keys
    after a query count for the forecast, but touch only blocks that are chosen anyway."""
    rules = policy(SELECTIONS[name], SELECTIONS[name])
    whole, part = run(model, tokens(), rules), run(model, tokens()[:, :57], rules)
    torch.testing.assert_close(whole[:, :57], part, atol=1e-5, rtol=1e-5)


def test_batches_do_not_matter(model: Path) -> None:
    rules = policy(SELECTIONS["forecast"], SELECTIONS["forecast"])
    whole = run(model, tokens(), rules)
    torch.testing.assert_close(run(model, tokens(), rules, batch=2), whole, atol=1e-5, rtol=1e-5)


def test_short_texts_are_attended_to_whole(model: Path) -> None:
    rules = policy(*[SELECTIONS["infllm"].model_copy(update={"dense_below": 91})] * 2)
    torch.testing.assert_close(run(model, tokens(), rules), run(model, tokens(), None))


def test_a_forecast_is_the_block_before_s(model: Path) -> None:
    """One block by hand: what block 0's attention reads, times its forecast, chooses in block 1."""
    chosen = policy(None, SELECTIONS["forecast"])
    source = open_source(model)
    seen: list[Any] = []

    def watching(unit: Any) -> Any:
        def hook(call: Any) -> torch.Tensor:
            seen.append(call)
            return call.plain(call.query, call.key, call.value)

        return hook

    run_blocks(
        [StreamedModel(source, watching)],
        tokens(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    first, second = seen
    weight = load_file(model / "model.safetensors")["model.layers.0.self_attn.q_future_proj.weight"]
    forecast = forecast_of(first.hidden, weight, kv_heads=2, rotary=first.rotary)
    blocks = SELECTIONS["forecast"].choose(rule_call(second, ahead=forecast))
    out = run(model, tokens(), chosen)
    hooked = run_with(model, lambda unit: fixed(blocks) if unit.layout.index == 1 else None)
    torch.testing.assert_close(out, hooked, atol=1e-5, rtol=1e-5)


def fixed(blocks: torch.Tensor) -> Any:
    def hook(call: Any) -> torch.Tensor:
        count = -(-call.key.shape[2] // 8)
        chosen = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool)
        chosen.scatter_(-1, blocks.long() % (count + 1), True)
        mask = chosen[..., :count].repeat_interleave(8, -1)[..., : call.key.shape[2]]
        mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
        return call.plain(call.query, call.key, call.value, mask.repeat_interleave(2, dim=1))

    return hook


def run_with(folder: Path, attending: Any) -> torch.Tensor:
    (stream,) = run_blocks(
        [StreamedModel(open_source(folder), attending)],
        tokens(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return stream.hidden


def test_streaming_heads_keep_their_window_beside_blocks(model: Path) -> None:
    held = StreamingHeads(heads=(1,), sinks=1, window=6)
    every = SELECTIONS["infllm"].model_copy(update={"top_k": 12})
    both = tuple(LayerPolicy(rules=(held, every)) for _ in range(2))
    alone = tuple(LayerPolicy(rules=(held,)) for _ in range(2))
    outs = [
        run(model, tokens(), AttentionPolicy(heads=4, kv_heads=2, layers=layers))
        for layers in (both, alone)
    ]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "opt"])
def test_other_families(tmp_path: Path, family: str) -> None:
    folder = build(family, tmp_path)
    heads = {"heads": 4, "kv_heads": 4 if family == "opt" else 2}
    every = SELECTIONS["infllm"].model_copy(update={"top_k": 12})
    few = AttentionPolicy(**heads, layers=(LayerPolicy(rules=(SELECTIONS["infllm"],)),) * 2)
    rules = AttentionPolicy(**heads, layers=(LayerPolicy(rules=(every,)),) * 2)
    plain = run(folder, tokens(), None)
    torch.testing.assert_close(run(folder, tokens(), rules), plain, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(run(folder, tokens(), few), plain, atol=1e-2)


def test_evaluation_follows_the_policy_in_the_folder(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rules = policy(SELECTIONS["forecast"], SELECTIONS["forecast"])
    for name, content in policy_files(rules).items():
        (tmp_path / name).write_bytes(content)
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    stored = evaluate(open_source(tmp_path), tokens(), **options)
    given = evaluate(open_source(model), tokens(), **options, attention=policy_attention(rules))
    assert stored.nll == given.nll
    assert stored.nll != evaluate(open_source(model), tokens(), **options).nll


def test_a_missing_forecast_is_named(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    with pytest.raises(InputError, match="forecast"):
        run(folder, tokens(), policy(None, SELECTIONS["forecast"]))


def test_recent_blocks_are_the_first_and_the_last() -> None:
    key = torch.zeros(1, 2, 90, 4)
    blocks = recent_blocks(SELECTIONS["infllm"], key, key)
    assert blocks[0, 0, 89].tolist() == [0, 9, 10, 11]
    assert blocks[0, 1, 10].tolist() == [0, 1, -1, -1]
