"""Multiple-choice tasks of lm-evaluation-harness, answered by the written files block by block.

An optional extra (`pip install compressor[harness]`): this is the only file that imports lm_eval.
Requests are laid out in rows padded on the right, which no causal model sees from the left, and a
row's tokens are scored from its hidden states, so that one unit of the model is in memory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
import torch
from compressor_calibration.passkeys import encode
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor

from compressor.attention.evaluation import as_stored
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.evaluate.perplexity import TaskScore
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.source_model import Attending
from compressor.runner.sweep import Progress, run_blocks

HIDDEN_BYTES = 2 << 30
"""Hidden states that are held at a time; the model is read once for each such part."""

METRICS = ("acc_norm,none", "acc,none")
"""What counts as a task's accuracy: the first of these that the task reports."""


@dataclass(frozen=True, slots=True)
class _Row:
    """Tokens of one request: context, then the scored ones."""

    index: int
    ids: tuple[int, ...]
    scored: int


class StreamedLM(LM):  # type: ignore[misc]
    """A checkpoint as the harness sees a model: it scores given continuations and writes none."""

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch: int = 8,
        length: int | None = None,
        attention: Attending | None = None,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """ranks  that share the rows of what each of them is asked: all are asked the same."""
        super().__init__()
        self.ranks = ranks
        self.source = source
        self.attention = attention
        self.tokenizer = tokenizer
        self.run_device = device
        self.dtype = dtype
        self.batch = batch
        known = source.layout.sizes.positions or 2048
        self.length = min(length or known, known)
        self.progress = progress
        bos = tokenizer.bos_token_id
        alone = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        # What the tokenizer puts before every text by itself.
        self._begin = [int(bos)] if alone and encode(self.tokenizer, "a")[:1] != [bos] else []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For (context, continuation): log-probability of the continuation, and whether greedy
        decoding would give it."""
        rows = []
        for index, request in enumerate(requests):
            context, continuation = request.args
            before, after = self._encode_pair(context, continuation)
            # The last token is only predicted, never read.
            kept = [*before, *after][-self.length - 1 :]
            rows.append(_Row(index, tuple(kept), min(len(after), len(kept) - 1)))
        return self._score(rows)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """For (text,): log-probability of all its tokens, in windows that do not overlap, each
        after one token of the one before it."""
        rows: list[_Row] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = [self._first(), *encode(self.tokenizer, request.args[0])]
            for start in range(0, len(ids) - 1, self.length):
                window = ids[start : start + self.length + 1]
                rows.append(_Row(len(rows), tuple(window), len(window) - 1))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(rows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Refused: a model that is read block by block for each token would never end."""
        raise InputError(
            "this task lets the model write, and only given answers are scored here",
            hint="choose multiple-choice tasks such as arc_easy, hellaswag or piqa",
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both texts, cut where the context ends; spaces go with what follows them."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if not bare:
            return [self._first()], encode(self.tokenizer, continuation)
        before, whole = encode(self.tokenizer, bare), encode(self.tokenizer, bare + continuation)
        return [*self._begin, *whole[: len(before)]], whole[len(before) :]

    def _first(self) -> int:
        """What stands before a text without context."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise InputError("the tokenizer has neither BOS nor EOS to begin a text with")

    def _score(self, rows: Sequence[_Row]) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for part in self._parts([row for row in rows if row.scored > 0]):
            length = max(len(row.ids) for row in part) - 1
            ids = torch.zeros(len(part), length, dtype=torch.int64)
            for i, row in enumerate(part):
                ids[i, : len(row.ids) - 1] = torch.tensor(row.ids[:-1])
            (stream,) = run_blocks(
                [as_stored(self.source, self.attention)],
                ids,
                device=self.run_device,
                dtype=self.dtype,
                batch=self.batch,
                progress=self.progress,
                ranks=self.ranks,
            )
            scores = torch.zeros(len(stream.rows), 2, dtype=torch.float64)
            with stream.logits() as logits:
                for place, i in enumerate(stream.rows):
                    ids_of, scored = part[i].ids, part[i].scored
                    hidden = stream.hidden[place, len(ids_of) - scored - 1 : len(ids_of) - 1]
                    scores[place] = torch.tensor(_likelihood(logits(hidden), ids_of[-scored:]))
            every = self.ranks.join_rows(scores, self.batch).tolist()
            for row, (value, best) in zip(part, every, strict=True):
                results[row.index] = value, bool(best)
        return results

    def _parts(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Rows in order of length, as many as may be held at a time."""
        width = self.source.layout.sizes.hidden * 4
        ordered = sorted(rows, key=lambda row: -len(row.ids))
        start = 0
        while start < len(ordered):
            room = max(1, HIDDEN_BYTES // (width * len(ordered[start].ids)))
            yield ordered[start : start + room]
            start += room


def _likelihood(logits: Tensor, wanted: Sequence[int]) -> tuple[float, float]:
    """Log-probability of the wanted ids, and 1 where each is the most likely one."""
    logs = torch.log_softmax(logits, -1)
    ids = torch.tensor(wanted, device=logs.device)
    total = logs.gather(1, ids[:, None]).double().sum()
    return float(total), float((logs.argmax(-1) == ids).all())


def run_tasks(
    model: StreamedLM, tasks: Sequence[Any], *, limit: int | None = None, seed: int = 0
) -> dict[str, TaskScore]:
    """Accuracy of each task with its standard error and count of documents.

    tasks  names the harness knows, or its task objects;  limit  documents of each task
    Raises InputError for a task that is unknown or reports no accuracy.
    """
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (KeyError, ValueError, OSError) as error:
        raise InputError(
            f"the harness cannot run {', '.join(map(str, tasks))}: {error}",
            hint="`lm_eval ls tasks` lists its tasks; their data sets come from the Hub",
        ) from error
    found = found or {}
    counts = {name: row.get("effective", 0) for name, row in found.get("n-samples", {}).items()}
    return {
        name: _accuracy(name, row, documents=counts.get(name, 0))
        for name, row in found["results"].items()
    }


def _accuracy(name: str, row: dict[str, Any], *, documents: int) -> TaskScore:
    for metric in METRICS:
        if isinstance(row.get(metric), float):
            kind = metric.partition(",")[0]
            error = row.get(f"{kind}_stderr,none")
            spread = error if isinstance(error, float) else math.nan
            return TaskScore(row[metric], spread, documents)
    raise InputError(f"the task {name} reports no accuracy", hint="choose multiple-choice tasks")
