"""How often each query head copies: retrieval heads (arXiv 2404.15574) under teacher forcing.

While an answer that was hidden in the text is given, a head scores where its most attended key is
the hidden token that comes next. The answers stand in the rows already, so all steps of a row are
one pass, and the model streams by: one unit is in memory at a time. The reference decodes instead;
the two agree wherever the model gives the right answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.methods.common.needles import Row
from compressor.runner.attention_call import AttentionCall
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution, Progress, sweep

ACCEPTED = 0.5
"""Share of an answer's tokens that a model must give for the answer to count, as the reference
demands by its ROUGE recall."""


@dataclass(frozen=True, slots=True, eq=False)
class CopyScores:
    """Scores of each accepted answer, float32 [layers, accepted, heads]; answers that were asked.

    An answer is accepted where the model gives it.
    """

    per_answer: Tensor
    answers: int

    @property
    def accepted(self) -> int:
        """Answers that count."""
        return self.per_answer.shape[1]

    @property
    def scores(self) -> Tensor:
        """Mean scores [layers, heads]."""
        return self.per_answer.mean(1)


def of_kv_heads(scores: Tensor, kv_heads: int) -> Tensor:
    """Scores [layers, kv_heads]: of a KV head, the highest of the query heads [layers, heads] that
    read it."""
    return scores.reshape(scores.shape[0], kv_heads, -1).amax(-1)


def copy_scores(
    model: SourceModel,
    rows: Sequence[Row],
    *,
    batch: int,
    progress: Progress = lambda name, done, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> CopyScores:
    """Score every query head over the answers of rows of one length.

    Raises InputError where the model answers none of them, since scores would mean nothing, and
    Interrupted when asked to stop.
    """
    ids = torch.stack([row.ids for row in rows])
    execution = Execution(batch, stopping=stopping, progress=progress)
    # Per block: hits of each answer [answers, heads].
    hits = []
    for step in sweep(model, ids, execution=execution):
        watch = _Watch(rows)
        step.run(hook=watch)
        hits.append(torch.cat([hit for row in range(len(rows)) for hit in watch.hits[row]]))
    good = _answered(model, rows, step.stream.hidden)
    if not bool(good.any()):
        raise InputError(
            f"the model answers none of the {len(good)} passkeys, so no head can be scored",
            hint="shorten the rows or the passkeys, or fit the templates to what it was trained on",
        )
    return CopyScores(per_answer=torch.stack([layer[good] for layer in hits]), answers=len(good))


def copied(looked: Tensor, ids: Tensor, given: Tensor | int, *, hidden: tuple[int, int]) -> Tensor:
    """Whether the most attended place is the hidden token that is being given, bool as `looked`.

    looked  places in the text ids [tokens];  hidden  the hidden words' places [start, stop)
    """
    inside = (looked >= hidden[0]) & (looked < hidden[1])
    return inside & (ids[looked.clamp(max=len(ids) - 1)] == given)


class _Watch:
    """An attention hook that notes, for each answer, how often each head looks at what it copies.

    hits  row → for each of its answers [1, heads], shares of the answer's tokens
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.hits: dict[int, list[Tensor]] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        group = call.query.shape[1] // call.key.shape[1]
        key = call.key.repeat_interleave(group, dim=1)
        for number in range(key.shape[0]):
            row = self.rows[call.first_row + number]
            hits = self.hits[call.first_row + number] = []
            for answer in row.answers:
                begin, end = answer.given
                at = torch.arange(begin - 1, end - 1, device=key.device)
                scores = call.query[number, :, at] @ key[number].transpose(-1, -2)
                scores = scores.float().masked_fill(~_visible(call, at, key.shape[2]), -torch.inf)
                looked = scores.argmax(-1).cpu()  # [heads, steps]
                right = copied(looked, row.ids, row.ids[begin:end], hidden=answer.hidden)
                length = answer.hidden[1] - answer.hidden[0]
                hits.append(right.sum(-1)[None].float() / length)
        return call.plain(call.query, call.key, call.value)


def _visible(call: AttentionCall, at: Tensor, keys: int) -> Tensor:
    """Which keys the queries at places `at` see under the model's own mask, bool [steps, keys]."""
    causal = torch.arange(keys, device=at.device)[None, :] <= at[:, None]
    if call.mask is None:
        return causal
    own = call.mask[0, 0, at]
    return causal & (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2)


def _answered(model: SourceModel, rows: Sequence[Row], hidden: Tensor) -> Tensor:
    """Whether the model gives most of each answer's tokens, bool [answers]."""
    good = []
    with model.logits() as logits:
        for number, row in enumerate(rows):
            for answer in row.answers:
                begin, end = answer.given
                best = logits(hidden[number, begin - 1 : end - 1]).argmax(-1).cpu()
                right = (best == row.ids[begin:end]).float().mean()
                good.append(bool(right > ACCEPTED))
    return torch.tensor(good)
