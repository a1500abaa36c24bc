"""Passkey rows are what they claim, and models that retrieve are told from those that cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from compressor_calibration.bundled import bundled_text
from pydantic import ValidationError
from torch import Tensor

from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.evaluate.passkey import Passkey, make_rows, passkey
from compressor.runner.attention_call import AttentionCall
from compressor.runner.tokenizer import load_tokenizer
from tests.support.golden_files import trained_model

CPU = torch.device("cpu")
HAYSTACK = "It was a bright day and nothing happened. " * 200
SMALL = Passkey(lengths=(200,), depths=(0.0, 0.5, 1.0), rows=2, words=2)


def test_rows_hold_needle_and_question_at_exactly_the_length(tiny_models: ModuleType) -> None:
    tokenizer = tiny_models.tokenizer()
    rows = make_rows(tokenizer, HAYSTACK, task=SMALL, length=200)
    assert rows.ids.shape == (6, 200) and len(set(map(tuple, rows.ids.tolist()))) == 6
    for ids, count, depth in zip(rows.ids, rows.answers, rows.depths, strict=True):
        answer = tokenizer.decode(ids[-count:]).strip()
        text = tokenizer.decode(ids)
        assert len(answer.split()) == 2
        assert text.count(answer) == 2 and text.endswith(f"It is: {answer}")
        place = text.index("\n\nRemember")
        filler = 200 - len(f"\n\nRemember this, the first passkey is: {answer}.\n\n")
        filler -= len(f"\n\nWhat is the first passkey? It is: {answer}")
        assert place == round(depth * filler), "one token is one character here"


def test_rows_follow_from_the_seed(tiny_models: ModuleType) -> None:
    tokenizer = tiny_models.tokenizer()
    first = make_rows(tokenizer, HAYSTACK, task=SMALL, length=200)
    again = make_rows(tokenizer, HAYSTACK, task=SMALL, length=200)
    other = make_rows(tokenizer, HAYSTACK, task=SMALL.model_copy(update={"seed": 1}), length=200)
    assert first.ids.equal(again.ids) and not first.ids.equal(other.ids)


def test_rows_that_cannot_be_made(tiny_models: ModuleType) -> None:
    tokenizer = tiny_models.tokenizer()
    with pytest.raises(InputError, match="does not hold"):
        make_rows(tokenizer, HAYSTACK, task=SMALL, length=60)
    with pytest.raises(InputError, match="the text has"):
        make_rows(tokenizer, "short", task=SMALL, length=200)


@pytest.mark.parametrize(
    "wrong",
    [
        {"needle": "no field"},
        {"question": "{passkey} is it?"},
        {"needle": "{passkey} {other}"},
        {"needle": "{} {passkey}"},
        {"needle": "{passkey!r}"},
        {"depths": (1.5,)},
        {"rows": 0},
        {"unknown": 1},
    ],
)
def test_parameters_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Passkey(**wrong)


def test_a_model_that_knows_nothing_finds_nothing(
    tiny_models: ModuleType, tiny_model: Callable[..., Path]
) -> None:
    source = open_source(tiny_model("llama"))
    found = passkey(
        source,
        tiny_models.tokenizer(),
        haystack=HAYSTACK,
        task=SMALL,
        device=CPU,
        dtype=torch.float32,
        against=source,
    )
    assert found.exact.value == 0 and found.accuracy.value < 0.3
    assert found.original_accuracy == found.accuracy
    assert [cell.depth for cell in found.cells] == [0.0, 0.5, 1.0]
    json.dumps(found.to_json(), allow_nan=False)


def test_retrieval_needs_attention_over_the_distance() -> None:
    """A trained model retrieves; with attention to the last 128 tokens only, it cannot."""
    folder = trained_model("llama")
    task = Passkey(lengths=(400,), depths=(0.0, 0.9), rows=3)

    def window(unit: Any) -> Callable[[AttentionCall], Tensor]:
        def hook(call: AttentionCall) -> Tensor:
            place = torch.arange(call.query.shape[2])
            near = (place[:, None] - place).clamp(min=-1)
            mask = (near >= 0) & (near < 128)
            repeat = call.query.shape[1] // call.key.shape[1]
            out = torch.nn.functional.scaled_dot_product_attention(
                call.query,
                call.key.repeat_interleave(repeat, 1),
                call.value.repeat_interleave(repeat, 1),
                attn_mask=mask,
                scale=call.scaling,
            )
            return out.transpose(1, 2)

        return hook

    found = passkey(
        open_source(folder),
        load_tokenizer(folder),
        haystack=bundled_text("held_out", "fiction"),
        task=task,
        device=CPU,
        dtype=torch.float32,
        against=open_source(folder),
        attention=window,
    )
    far, near = found.cells
    assert far.original_exact == 1 and near.original_exact == 1
    assert far.exact == 0 and near.accuracy > far.accuracy
