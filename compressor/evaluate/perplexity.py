"""Measures a written checkpoint on tokens: perplexity, and how far it is from the original.

A standard error is over windows, since tokens of one window are not independent (over tokens where
there is one window); that of a ratio to the original is over paired differences.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.attention.evaluation import as_stored
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout
from compressor.numerics.processor import multiplies_bfloat16, products_of_bfloat16
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.activations import Activations
from compressor.runner.source_model import Attending
from compressor.runner.sweep import FinalStates, Progress, run_blocks

LOGIT_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
"""Logits of one model in memory at a time. On a CPU, more than 32 MB of them would come from heaps
that no longer shrink: with twice as many, the resident size grew by half a gigabyte."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, or what follows from one, with its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class TaskScore(Estimate):
    """Accuracy in a task over so many documents (0: the harness does not say)."""

    documents: int = 0


@dataclass(frozen=True, slots=True)
class BlockError:
    """Squared difference of the hidden states after a block to the original's, relative to them."""

    name: str
    error: float


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What evaluation found.

    windows, length      rows of tokens;  tokens  targets that were scored
    nll, perplexity      of the checkpoint;  original_*  of the original
    perplexity_ratio     to the original's, on the same tokens
    kl                   mean KL(original ‖ ours) of the next-token distributions, in nats
    top1                 share of tokens whose most likely successor is the original's
    blocks               how the difference grows from block to block
    What compares with the original is None without one.
    """

    windows: int
    length: int
    tokens: int
    nll: Estimate
    perplexity: Estimate
    original_nll: Estimate | None = None
    original_perplexity: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None
    blocks: tuple[BlockError, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data in which a number that is not finite is null."""
        found: dict[str, Any] = plain_json(asdict(self))
        return found


def evaluate(
    source: Source,
    tokens: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    against: Source | None = None,
    scored: Tensor | None = None,
    attention: Attending | None = None,
    activations: Activations | None = None,
    batch: int = 8,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> EvaluationResult:
    """Measure a checkpoint as it is stored, with its quantized inputs and KV cache applied; a model
    of bfloat16 with products of it where a CPU is faster at them.

    tokens     ids [windows, length]; each window is read alone
    against    the original
    scored     bool [windows, length − 1]: which targets count (all); `strided` makes one
    attention  what attends in its blocks; the policy that the checkpoint carries, if None
    ranks      among which windows are divided: all of them get the same result
    Raises InputError for tokens that the models cannot take.
    """
    start = time.perf_counter()
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise InputError("evaluation needs windows of at least two tokens")
    counted = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if scored is None else scored
    if counted.shape != tokens[:, 1:].shape or not bool(counted.any()):
        raise InputError("`scored` does not mark targets of these windows")
    originals = [as_stored(against, activations=activations)] if against else []
    models = [as_stored(source, attention, longest=tokens.shape[1]), *originals]
    differences: dict[str, Tensor] = {}

    def after_block(unit: UnitLayout, hidden: Sequence[Tensor]) -> None:
        if len(hidden) == 2:
            differences[unit.name] = _squares(hidden[0], hidden[1])

    with _products(device, dtype, [source, *([against] if against else [])]):
        streams = run_blocks(
            models,
            tokens,
            device=device,
            dtype=dtype,
            batch=batch,
            progress=progress,
            after_block=after_block,
            ranks=ranks,
        )
        ours, original, kl, same = (
            None if score is None else ranks.join_rows(score, batch)
            for score in token_scores(streams, tokens, counted)
        )
    assert ours is not None and kl is not None and same is not None
    every = {name: ranks.join_rows(part, batch) for name, part in differences.items()}
    found = replace(compared(ours, original, counted=counted), length=tokens.shape[1])
    if original is not None:
        blocks = tuple(BlockError(n, _relative_error(part)) for n, part in every.items())
        found = replace(found, kl=_mean(kl, counted), top1=_mean(same, counted), blocks=blocks)
    return replace(found, seconds=time.perf_counter() - start)


def _products(
    device: torch.device, dtype: torch.dtype, sources: Sequence[Source]
) -> AbstractContextManager[None]:
    """Products of bfloat16 models with inputs in bfloat16, as on a GPU, on a CPU that is quicker at
    them; all else, hidden states included, stays in `dtype`."""
    stored = {source.checkpoint.dtype for source in sources}
    narrow = device.type == "cpu" and dtype == torch.float32 and stored == {torch.bfloat16}
    return products_of_bfloat16(quick=narrow and multiplies_bfloat16())


def compared(ours: Tensor, original: Tensor | None, *, counted: Tensor) -> EvaluationResult:
    """What losses of a checkpoint and of its original [windows, length] say, where they count."""
    nll, before = _mean(ours, counted), None if original is None else _mean(original, counted)
    ratio = None if original is None else _exp(_mean(ours - original, counted))
    return EvaluationResult(
        windows=ours.shape[0],
        length=ours.shape[1],
        tokens=int(counted.sum()),
        nll=nll,
        perplexity=_exp(nll),
        original_nll=before,
        original_perplexity=None if before is None else _exp(before),
        perplexity_ratio=ratio,
    )


def strided(ids: Tensor, *, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Overlapping windows over a text [tokens], and which of their targets count.

    A window begins `stride` tokens after the one before it and scores only what that one did not;
    the last one ends with the text. Every token but the first is scored once. Gives ids
    [windows, length] and bool [windows, length − 1]; raises InputError where the text is shorter
    than a window.
    """
    total = ids.shape[0]
    if not 0 < stride <= length - 1:
        raise InputError(f"stride {stride} does not lie between 1 and {length - 1}")
    if total < length:
        raise InputError(f"the text has {total} tokens, a window {length}")
    ends = list(range(length, total, stride))
    ends.append(total)
    rows = torch.stack([ids[end - length : end] for end in ends])
    scored = torch.zeros(len(ends), length - 1, dtype=torch.bool)
    reached = 1
    for row, end in enumerate(ends):
        scored[row, length - 1 - (end - reached) :] = True
        reached = end
    return rows, scored


def token_scores(
    streams: Sequence[FinalStates], tokens: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """For every counted target [rows, length − 1] (zero elsewhere), in float64: our negative
    log-likelihood, the original's, KL(original ‖ ours), and whether the best token is the same.

    streams  of `run_blocks` over `tokens` [windows, length]: ours, and the original's if there are
             two; scores are of their rows
    """
    rows, batch = list(streams[0].rows), streams[0].batch
    targets, counted = tokens[rows, 1:], counted[rows]
    nlls = [torch.zeros(targets.shape, dtype=torch.float64) for _ in streams]
    kl, same = torch.zeros_like(nlls[0]), torch.zeros_like(nlls[0])
    with ExitStack() as stack:
        heads = [stack.enter_context(stream.logits()) for stream in streams]
        vocabulary = streams[0].model.layout.sizes.vocabulary
        room = LOGIT_ELEMENTS.get(streams[0].model.device.type, LOGIT_ELEMENTS["cpu"])
        at_once = max(1, room // vocabulary)
        # Chunk by chunk, since a product's bits may depend on how many rows it has.
        chunks = (
            counted[i : i + batch].nonzero() + torch.tensor([i, 0])
            for i in range(0, len(rows), batch)
        )
        for part in (part for places in chunks for part in torch.split(places, at_once)):
            row, column = part[:, 0], part[:, 1]
            logs = [
                torch.log_softmax(head(stream.hidden[row, column]), dim=-1)
                for head, stream in zip(heads, streams, strict=True)
            ]
            wanted = targets[row, column].to(logs[0].device).unsqueeze(1)
            for nll, log in zip(nlls, logs, strict=True):
                nll[row, column] = -log.gather(1, wanted)[:, 0].double().cpu()
            if len(logs) == 2:
                mine, theirs = logs
                same[row, column] = (mine.argmax(1) == theirs.argmax(1)).double().cpu()
                # A token the original rules out (log 0) adds nothing, and 0 · ∞ is not a number.
                gap = (theirs - mine).masked_fill_(theirs.isneginf(), 0.0)
                kl[row, column] = theirs.exp_().mul_(gap).sum(1).double().cpu()
    return nlls[0], (nlls[1] if len(nlls) == 2 else None), kl, same


def _squares(ours: Tensor, original: Tensor) -> Tensor:
    """Squared difference and squared size of each row, float64 [rows, 2] on the CPU; row by row, so
    that no copy of all states is made."""
    found = torch.zeros(len(ours), 2, dtype=torch.float64, device=ours.device)
    for row, a, b in zip(found, ours, original, strict=True):
        a, b = a.float(), b.float()
        row[0] = (a - b).square().sum(dtype=torch.float64)
        row[1] = b.square().sum(dtype=torch.float64)
    return found.cpu()


def _relative_error(squares: Tensor) -> float:
    """Squared difference over squared size, of all rows [rows, 2]."""
    difference, size = squares.sum(0).tolist()
    return float(difference / max(size, 1e-30))


def _mean(values: Tensor, counted: Tensor) -> Estimate:
    """Mean of the counted values [windows, n] with its standard error."""
    number = int(counted.sum())
    mean = float(values[counted].sum()) / number
    if values.shape[0] > 1:
        sums = torch.where(counted, values - mean, 0.0).sum(1)
        groups = values.shape[0]
    else:
        sums, groups = values[counted] - mean, number
    spread = float(sums.square().sum()) * groups / max(groups - 1, 1)
    return Estimate(value=mean, error=math.sqrt(spread) / number if spread >= 0 else math.nan)


def _exp(estimate: Estimate) -> Estimate:
    """exp of a mean; the error to first order."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value=value, error=value * estimate.error)


def plain_json(value: Any) -> Any:
    """Plain data in which tuples are lists and a number that is not finite is None."""
    if isinstance(value, dict):
        return {key: plain_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
