"""A model run block by block gives what transformers gives for the whole of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.checkpoint.source import Source, open_source
from compressor.runner.block_runner import BlockRunner
from tests.support.tiny_models import TYPES


def block_by_block(source: Source, ids: Tensor, *, batch: int) -> Tensor:
    """Logits [rows, length, vocabulary] of a source, one unit in memory."""
    runner = BlockRunner(
        source.checkpoint.config,
        source.arch.runtime,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    first, *blocks, last = source.layout.units
    embedding = source.read_unit(first).dequantized()
    hidden = runner.embed(embedding, ids, batch=batch)
    for unit in blocks:
        with runner.loaded(unit, source.read_unit(unit).dequantized()) as block:
            hidden = torch.cat([block.forward(rows) for rows in hidden.split(batch)])
    head = source.read_unit(last).dequantized()
    tied = source.layout.tied
    weight = embedding[tied] if tied else head["lm_head.weight"]
    with runner.head(head, weight) as logits:
        found: Tensor = logits(hidden)
    assert all(p.is_meta for p in runner.model.parameters()), "a unit stayed in memory"
    return found


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_those_of_the_whole_model(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model(model_type)
    # Longer than the sliding window of the families that have one; rows that no batch divides.
    ids = torch.randint(2, 256, (3, 48), generator=torch.Generator().manual_seed(1))
    attention = "eager" if model_type == "gemma2" else "sdpa"
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    with torch.no_grad():
        expected = whole(ids).logits
    found = block_by_block(open_source(folder), ids, batch=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.argmax(-1).equal(expected.argmax(-1))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe"])
def test_two_lengths_do_not_mix(model_type: str, tiny_model: Callable[..., Path]) -> None:
    """What layers get beside the hidden states belongs to a length."""
    source = open_source(tiny_model(model_type))
    ids = torch.randint(2, 256, (1, 48), generator=torch.Generator().manual_seed(2))
    long = block_by_block(source, ids, batch=1)
    short = block_by_block(source, ids[:, :20], batch=1)
    torch.testing.assert_close(short, long[:, :20], rtol=1e-4, atol=1e-5)
