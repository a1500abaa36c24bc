"""A model without the rows of its suspect tokens: audited, measured and only then written.

Each defence is audited by itself. One that leaves every suspect token suspect is said to have done
nothing, and is not in what is written.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compressor.audit.findings import Audit, TokenScore
from compressor.audit.prune import pruned_checkpoint
from compressor.audit.reset import reset_checkpoint
from compressor.audit.weights import large_rows, row_norms
from compressor.checkpoint.manifest import hash_file
from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.transaction import write
from compressor.checkpoint.workspace import lacking_room, refusal
from compressor.errors import CheckError, InputError
from compressor.evaluate.perplexity import EvaluationResult
from compressor.evaluate.settings import Evaluation
from compressor.run.audit import Audited, SweepOptions, audit
from compressor.run.editable import Editable, editable
from compressor.run.environment import versions
from compressor.runner.execution import Progress

Stage = Callable[[str, int], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Effect:
    """What resetting a suspect token's row did to it."""

    before: TokenScore
    after: TokenScore

    @property
    def nothing(self) -> bool:
        """Whether it is as suspect as before."""
        return self.before.suspect and self.after.suspect


@dataclass(frozen=True, slots=True)
class Pruned:
    """What fine-pruning came to: tokens that were suspect before and are after it.

    share  of each block's channels that were silenced
    ratio  of perplexities by it alone;  limit  what is allowed
    """

    share: float
    before: int
    after: int
    ratio: float
    limit: float

    @property
    def nothing(self) -> bool:
        """Whether it made no token less suspect."""
        return self.after >= self.before

    @property
    def kept(self) -> bool:
        """Whether it is in what is written."""
        return not self.nothing and self.ratio <= self.limit


@dataclass(frozen=True, slots=True)
class Sanitized:
    """Before and after.

    rows      table → ids whose rows were reset; empty where nothing is suspect of a token
    after     the audit of what was written, None where nothing was
    measured  perplexity after, and before as the original's
    pruned    what fine-pruning did, where it was tried
    """

    output: Path
    before: Audit
    rows: Mapping[str, tuple[int, ...]]
    after: Audit | None = None
    measured: EvaluationResult | None = None
    pruned: Pruned | None = None

    @property
    def effects(self) -> tuple[Effect, ...]:
        """Tokens that were tried before and after, the highest score before first."""
        return _effects(self.rows, self.before, self.after)

    @property
    def suspect(self) -> bool:
        """Whether what is left decides against the model."""
        return (self.after or self.before).suspect

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ok": not self.suspect,
            "output": None if self.after is None else str(self.output),
            "reset": {name: list(ids) for name, ids in self.rows.items()},
            "did_nothing": [effect.before.id for effect in self.effects if effect.nothing],
            "pruned": None
            if self.pruned is None
            else {
                **asdict(self.pruned),
                "did_nothing": self.pruned.nothing,
                "kept": self.pruned.kept,
            },
            "before": self.before.to_json(),
            "after": None if self.after is None else self.after.to_json(),
            "perplexity": None if self.measured is None else self.measured.to_json(),
        }


def sanitize(
    model: Audited,
    output: Path,
    *,
    sweep: SweepOptions,
    held_out: Evaluation,
    max_ppl_ratio: float,
    device: torch.device,
    prune: float | None = None,
    max_shard_size: int = 5 * 10**9,
    stage: Stage = lambda name, total: nullcontext(),
    progress: Progress = lambda name, done, total: None,
) -> Sanitized:
    """Reset the rows of tokens that an audit suspects, and write the model into `output`.

    prune  share of each block's MLP channels, the idlest on other text, that are silenced first;
           kept where that makes a suspect token ordinary, within the same limit

    Nothing is written where no token is suspect. Raises InputError for a model that is not edited
    so, and CheckError, before anything is written, where no suspect token got better or perplexity
    on `held_out` grew beyond `max_ppl_ratio` times what it was.
    """
    checkpoint = model.checkpoint
    for error in (
        refusal(output, models=[checkpoint.folder]),
        lacking_room(output, checkpoint.nbytes),
    ):
        if error is not None:
            raise error
    subject = editable(model, held_out, device=device)
    before = audit(model, sweep=sweep, device=device, stage=stage, progress=progress)
    bad = next((found for found in before.findings if found.check == "finite"), None)
    if bad is not None:
        raise InputError(
            f"{bad.tensor}: {bad.message}",
            hint="the model is damaged, which resetting rows does not mend: get it again",
        )
    rows = suspect_rows(subject, before)
    if not rows:
        return Sanitized(output, before, rows)
    followed = tuple(sorted({i for ids in rows.values() for i in ids}))

    def look(edited: Checkpoint) -> Audit:
        return audit(
            subject.edited(edited),
            sweep=replace(sweep, followed=followed),
            device=device,
            stage=stage,
            progress=progress,
        )

    def measure(edited: Checkpoint) -> EvaluationResult:
        with stage("perplexity", 0):
            return subject.measure(edited, progress)

    base, pruned, columns = checkpoint, None, {}
    if prune is not None:
        with stage("prune", 0):
            columns = subject.idle(prune, progress)
        tried = pruned_checkpoint(checkpoint, columns)
        ratio = measure(tried).perplexity_ratio
        assert ratio is not None
        pruned = Pruned(
            prune, _suspects(before), _suspects(look(tried)), ratio.value, max_ppl_ratio
        )
        base, columns = (tried, columns) if pruned.kept else (checkpoint, {})
    edited = reset_checkpoint(base, rows)
    after = look(edited)
    effects = _effects(rows, before, after)
    if effects and all(effect.nothing for effect in effects):
        raise CheckError(
            f"resetting {len(effects)} rows did nothing: each of these tokens is suspect as before",
            hint="nothing was written; what they do is not in their rows alone, so train the model "
            "anew from a source that you trust",
        )
    measured = measure(edited)
    _hold(measured, max_ppl_ratio)
    target, read, files = subject.written(edited, max_shard_size)
    with stage("write", len(target.units)):
        write(
            target,
            output,
            read,
            about=_about(model.name, checkpoint, rows, columns),
            beside=checkpoint.folder,
            files=files,
            progress=progress,
        )
    return Sanitized(output, before, rows, after, measured, pruned)


def suspect_rows(subject: Editable, found: Audit) -> dict[str, tuple[int, ...]]:
    """Table → rows to reset: those of suspect tokens in the embedding, and rows that are far too
    long in the table that has them."""
    rows: dict[str, set[int]] = {}
    if found.sweep is not None and found.sweep.suspects:
        ids = {token.id for token in found.sweep.suspects}
        rows = {name: set(ids) for name in subject.tables()}
    for finding in found.findings:
        if finding.check == "rows" and finding.level == "suspect":
            table = subject.audited.checkpoint.read([finding.tensor])[finding.tensor]
            long = large_rows(row_norms(table)).tolist()
            rows.setdefault(finding.tensor, set()).update(long)
    return {name: tuple(sorted(ids)) for name, ids in rows.items()}


def _hold(measured: EvaluationResult, limit: float) -> None:
    """Raises CheckError where perplexity grew beyond the limit, or is no number."""
    ratio, was = measured.perplexity_ratio, measured.original_perplexity
    assert ratio is not None and was is not None
    if not ratio.value <= limit:
        raise CheckError(
            f"perplexity went from {was.value:.4g} to {measured.perplexity.value:.4g}, "
            f"{ratio.value:.4f} times (± {ratio.error:.4f}), beyond --max-ppl-ratio {limit:g}",
            hint="nothing was written; the suspect tokens are ones that the text needs, or allow "
            "more with --max-ppl-ratio",
        )


def _effects(
    rows: Mapping[str, tuple[int, ...]], before: Audit, after: Audit | None
) -> tuple[Effect, ...]:
    if before.sweep is None or after is None or after.sweep is None:
        return ()
    reset = {i for ids in rows.values() for i in ids}
    now = {token.id: token for token in after.sweep.tokens}
    return tuple(
        Effect(token, now[token.id])
        for token in before.sweep.tokens
        if token.id in reset and token.id in now
    )


def _suspects(found: Audit) -> int:
    return 0 if found.sweep is None else len(found.sweep.suspects)


def _about(
    name: str,
    checkpoint: Checkpoint,
    rows: Mapping[str, tuple[int, ...]],
    columns: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """What decides the bytes of the result."""
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    return {
        "sanitize": {
            "reset_to": "mean",
            "rows": {n: list(ids) for n, ids in rows.items()},
            **({"silenced": {n: list(ids) for n, ids in columns.items()}} if columns else {}),
        },
        "source": {"name": name, "files": {f.name: hash_file(f).sha256 for f in files}},
        "versions": versions(),
    }
