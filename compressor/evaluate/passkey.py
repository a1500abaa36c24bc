"""Passkey retrieval: a sentence hidden at some depth of a long text, asked for at its end.

Answers are scored under teacher forcing. A row counts as exact where every token of the answer is
the most likely one, which is when greedy decoding gives that answer.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from compressor_calibration.passkeys import (
    WORDS,
    Encoder,
    check_end,
    check_fields,
    encode,
    encode_key,
)
from pydantic import Field, field_validator
from torch import Tensor

from compressor.attention.evaluation import as_stored
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.evaluate.perplexity import Estimate
from compressor.ir.frozen import Strict
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.activations import Activations
from compressor.runner.source_model import Attending
from compressor.runner.sweep import FinalStates, Progress, run_blocks


class Passkey(Strict):
    """Recipe parameters of the passkey probe."""

    lengths: tuple[int, ...] = Field((512, 1024), min_length=1, description="tokens per row")
    depths: tuple[float, ...] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="where the passkey lies, 0 to 1"
    )
    rows: int = Field(4, ge=1, description="rows for each length and depth")
    words: int = Field(3, ge=1, le=len(WORDS), description="words of a passkey")
    needle: str = Field(
        "\n\nRemember this, the first passkey is: {passkey}.\n\n",
        description="the sentence that is hidden; {passkey} stands for the words",
    )
    question: str = Field(
        "\n\nWhat is the first passkey? It is: {passkey}",
        description="what ends a row; {passkey} comes last",
    )
    seed: int = Field(0, description="of the words and places")

    @field_validator("needle", "question")
    @classmethod
    def _has_passkey(cls, value: str) -> str:
        return check_fields(value, "passkey")

    _ends_with_passkey = field_validator("question")(check_end)

    @field_validator("depths")
    @classmethod
    def _are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= depth <= 1 for depth in value):
            raise ValueError("depths lie between 0 and 1")
        return value


def haystack_characters(task: Passkey) -> int:
    """How much text the rows are cut from."""
    return max(40 * max(task.lengths), 4096)


@dataclass(frozen=True, slots=True, eq=False)
class PasskeyRows:
    """Rows of one length.

    ids      int64 [rows, length];  answers  how many tokens of each row, its last ones, are the
    answer;  depths  where its passkey lies
    """

    ids: Tensor
    answers: tuple[int, ...]
    depths: tuple[float, ...]


SCORES = ("accuracy", "exact", "original_accuracy", "original_exact")


@dataclass(frozen=True, slots=True)
class PasskeyCell:
    """One length and depth: share of answer tokens that were found, and of rows found whole."""

    length: int
    depth: float
    rows: int
    accuracy: float
    exact: float
    original_accuracy: float | None = None
    original_exact: float | None = None


@dataclass(frozen=True, slots=True)
class PasskeyResult:
    """All cells, and the means over rows with their standard errors.

    tokens  of all answers, each of which was scored
    """

    cells: tuple[PasskeyCell, ...]
    accuracy: Estimate
    exact: Estimate
    original_accuracy: Estimate | None = None
    original_exact: Estimate | None = None
    tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def passkey(
    source: Source,
    tokenizer: Encoder,
    *,
    haystack: str,
    task: Passkey,
    device: torch.device,
    dtype: torch.dtype,
    against: Source | None = None,
    attention: Attending | None = None,
    activations: Activations | None = None,
    batch: int = 4,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> PasskeyResult:
    """Score retrieval from `haystack` by the written checkpoint, and by the original.

    ranks  among which rows are divided: all of them get the same result
    Raises InputError where the haystack is too short for a row, or a row for its question.
    """
    # Per length: depths of the rows, then one (accuracy, exact) table [rows, 2] for each model.
    found: list[tuple[PasskeyRows, list[Tensor]]] = []
    for length in task.lengths:
        rows = make_rows(tokenizer, haystack, task=task, length=length)
        originals = [as_stored(against, activations=activations)] if against else []
        models = [as_stored(source, attention, longest=max(task.lengths)), *originals]
        streams = run_blocks(
            models,
            rows.ids,
            device=device,
            dtype=dtype,
            batch=batch,
            progress=progress,
            ranks=ranks,
        )
        scores = [ranks.join_rows(_scores(stream, rows), batch) for stream in streams]
        found.append((rows, scores))
    cells = [
        _cell(length, depth, rows, scores)
        for length, (rows, scores) in zip(task.lengths, found, strict=True)
        for depth in task.depths
    ]
    means = [
        _means(torch.cat([scores[m] for _, scores in found])) for m in range(2 if against else 1)
    ]
    return PasskeyResult(
        cells=tuple(cells),
        **dict(zip(SCORES, chain(*means), strict=False)),
        tokens=sum(sum(rows.answers) for rows, _ in found),
    )


def make_rows(tokenizer: Encoder, haystack: str, *, task: Passkey, length: int) -> PasskeyRows:
    """Rows of exactly `length` tokens: text, the needle at its depth, text, question and answer."""
    draw = random.Random(f"{task.seed} {length}")
    # Twice as many characters as a row can have leave room to begin at different places.
    text = encode(tokenizer, haystack[: max(40 * length, 4096)])
    rows, answers, depths = [], [], []
    for depth in task.depths:
        for _ in range(task.rows):
            key = " ".join(draw.sample(WORDS, task.words))
            needle = encode(tokenizer, task.needle.format(passkey=key))
            question, answer = encode_key(tokenizer, task.question.format(passkey=""), key)
            room = length - len(needle) - len(question) - len(answer)
            if room < 0:
                raise InputError(
                    f"a row of {length} tokens does not hold the passkey and its question",
                    hint=f"passkey lengths of {length - room} and more do",
                )
            if len(text) < room:
                raise InputError(
                    f"the text has {len(text)} tokens, a row of {length} takes {room}",
                    hint="give a longer text, or shorter rows",
                )
            start = draw.randrange(len(text) - room + 1)
            place = round(depth * room)
            before, after = text[start : start + place], text[start + place : start + room]
            rows.append([*before, *needle, *after, *question, *answer])
            answers.append(len(answer))
            depths.append(depth)
    return PasskeyRows(torch.tensor(rows), tuple(answers), tuple(depths))


def _scores(stream: FinalStates, rows: PasskeyRows) -> Tensor:
    """Share of answer tokens that are the most likely ones, and whether all are, for each of the
    stream's rows: [rows, 2]."""
    scores = torch.zeros(len(stream.rows), 2, dtype=torch.float64)
    with stream.logits() as logits:
        for place, row in enumerate(stream.rows):
            count = rows.answers[row]
            best = logits(stream.hidden[place, -count - 1 : -1]).argmax(-1).cpu()
            right = best == rows.ids[row, -count:]
            scores[place] = torch.tensor([right.double().mean(), right.all().double()])
    return scores


def _cell(length: int, depth: float, rows: PasskeyRows, scores: Sequence[Tensor]) -> PasskeyCell:
    mine = torch.tensor([d == depth for d in rows.depths])
    values = [table[mine].mean(0).tolist() for table in scores]
    return PasskeyCell(
        length=length,
        depth=depth,
        rows=int(mine.sum()),
        **dict(zip(SCORES, chain(*values), strict=False)),
    )


def _means(scores: Tensor) -> list[Estimate]:
    """Means over rows [rows, 2] with their standard errors."""
    count = scores.shape[0]
    spread = scores.std(0) / math.sqrt(count) if count > 1 else torch.zeros(2)
    return [
        Estimate(value=float(value), error=float(error))
        for value, error in zip(scores.mean(0), spread, strict=True)
    ]
