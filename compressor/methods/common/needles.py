"""Rows that can only be answered by looking far back: passkeys hidden in a text, asked at its end.

The training data of DuoAttention (arXiv 2410.10819): several keys of random words at random depths
of any haystack, then a question and its answer for each. Unlike the reference, whose rows are
longer than their nominal length by needles and questions, a row here has exactly its length.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from compressor_calibration.passkeys import (
    WORDS,
    Encoder,
    check_end,
    check_fields,
    encode,
    encode_key,
)
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.frozen import Strict
from compressor.ir.layout import ModelLayout

# fmt: off
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth",
    "eighteenth", "nineteenth", "twentieth",
)
# fmt: on
DEPTHS = 1000


class Needles(Strict):
    """Recipe parameters of multi-passkey rows; the haystack is the calibration tokens."""

    keys: int = Field(10, ge=1, le=len(ORDINALS), description="passkeys in a row")
    words: int = Field(32, ge=1, description="words of a passkey, drawn with replacement")
    min_length: int = Field(1000, ge=16, description="tokens of the shortest row")
    max_length: int = Field(4096, ge=16, description="tokens of the longest row")
    lengths: int = Field(50, ge=1, description="different lengths, evenly spaced")
    prefix: str = Field("This is a very long story book: <book> ", description="what begins a row")
    suffix: str = Field(" </book>.\n\n", description="what ends the haystack")
    needle: str = Field(
        "\n\nRemember this sequence of words, it's the {ordinal} passkey to the vault: {passkey}"
        "\n\n",
        description="the sentence that is hidden",
    )
    question: str = Field(
        "Based on the content of the book, what is the {ordinal} passkey to the vault?\nPasskey: "
        "{passkey}",
        description="asked once for each key; {passkey} comes last",
    )
    separator: str = Field("\n\n", description="what follows each answer")
    supervise: Literal["questions", "answers"] = Field(
        "questions", description="places that are compared: the whole tail, or its answers"
    )

    @field_validator("needle", "question")
    @classmethod
    def _has_fields(cls, value: str) -> str:
        return check_fields(value, "ordinal", "passkey")

    _ends_with_passkey = field_validator("question")(check_end)

    @model_validator(mode="after")
    def _lengths_ascend(self) -> Self:
        if self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is less than {self.min_length}")
        return self

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Lengths of the rows, shortest first."""
        if self.lengths == 1:
            return (self.max_length,)
        step = (self.max_length - self.min_length) / (self.lengths - 1)
        return tuple(int(self.min_length + i * step) for i in range(self.lengths))


@dataclass(frozen=True, slots=True)
class Answer:
    """One key in a row: token places [start, stop) of the hidden words and of the answer."""

    hidden: tuple[int, int]
    given: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row: ids int64 [length], places to compare bool [length], and its keys in order."""

    ids: Tensor
    scored: Tensor
    answers: tuple[Answer, ...]


def make_row(
    tokenizer: Encoder, haystack: Sequence[int], *, data: Needles, length: int, draw: random.Random
) -> Row:
    """A row of exactly `length` tokens. Raises InputError where keys or haystack do not fit."""
    keys = [" ".join(draw.choices(WORDS, k=data.words)) for _ in range(data.keys)]
    needles = [_needle(tokenizer, data, ORDINALS[i], key) for i, key in enumerate(keys)]
    tail, spans = _tail(tokenizer, data, keys)
    prefix, suffix = encode(tokenizer, data.prefix), encode(tokenizer, data.suffix)
    room = length - len(prefix) - len(suffix) - len(tail) - sum(len(ids) for ids, _ in needles)
    if room < data.keys:
        raise InputError(
            f"{data.keys} passkeys of {data.words} words leave no room for text in a row of "
            f"{length} tokens",
            hint=f"rows of {length - room + data.keys} tokens and more do; or fewer keys or words",
        )
    if len(haystack) < room:
        raise InputError(
            f"the haystack has {len(haystack)} tokens, a row of {length} takes {room}",
            hint="raise calibration.samples or calibration.length",
        )
    start = draw.randrange(len(haystack) - room + 1)
    text = list(haystack[start : start + room])
    # Depths from 0.05 to 0.95, one key at each.
    steps = sorted(draw.sample(range(DEPTHS), data.keys))
    places = [int(room * (0.05 + 0.9 * step / (DEPTHS - 1))) for step in steps]
    ids, hidden, before = list(prefix), [], 0
    for place, (needle, (begin, end)) in zip(places, needles, strict=True):
        ids += text[before:place]
        hidden.append((len(ids) + begin, len(ids) + end))
        ids += needle
        before = place
    ids += text[before:] + suffix
    base = len(ids)
    ids += tail
    answers = tuple(
        Answer(hidden=place, given=(base + begin, base + end))
        for place, (begin, end) in zip(hidden, spans, strict=True)
    )
    scored = torch.zeros(length, dtype=torch.bool)
    if data.supervise == "questions":
        scored[base:] = True
    else:
        for answer in answers:
            # What precedes an answer's token predicts it.
            scored[answer.given[0] - 1 : answer.given[1] - 1] = True
    return Row(ids=torch.tensor(ids), scored=scored, answers=answers)


def _needle(
    tokenizer: Encoder, data: Needles, ordinal: str, key: str
) -> tuple[list[int], tuple[int, int]]:
    """Tokens of a hidden sentence, and where in them its words lie."""
    before, after = data.needle.format(ordinal=ordinal, passkey="\0").split("\0")
    head, words = encode_key(tokenizer, before, key)
    return head + words + encode(tokenizer, after), (len(head), len(head) + len(words))


def _tail(
    tokenizer: Encoder, data: Needles, keys: Sequence[str]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of all questions with their answers, and where in them the answers lie."""
    ids: list[int] = []
    spans = []
    after = encode(tokenizer, data.separator)
    for ordinal, key in zip(ORDINALS, keys, strict=False):
        asked = data.question.format(ordinal=ordinal, passkey="")
        question, words = encode_key(tokenizer, asked, key)
        ids += question
        spans.append((len(ids), len(ids) + len(words)))
        ids += words + after
    return ids, spans


def too_long(data: Needles, layout: ModelLayout) -> Iterator[InputError]:
    """An error where rows have more tokens than the model has positions."""
    positions = layout.sizes.positions
    if positions is not None and data.max_length > positions:
        yield InputError(
            f"rows of {data.max_length} tokens are longer than the model's {positions} positions",
            hint="lower data.max_length",
        )
