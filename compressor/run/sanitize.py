"""A model without the rows of its suspect tokens: audited, measured and only then written.

Each defence is audited by itself. One that leaves every suspect token suspect is said to have done
nothing, and is not in what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.arch.sizes import vocabulary
from compressor.audit.findings import Audit, TokenScore
from compressor.audit.prune import idle_channels, pruned_checkpoint
from compressor.audit.reset import reset_checkpoint
from compressor.audit.weights import large_rows, row_norms
from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.manifest import MANIFEST_NAME, hash_file
from compressor.checkpoint.source import Source
from compressor.checkpoint.target import ModelTarget
from compressor.checkpoint.transaction import write
from compressor.checkpoint.workspace import lacking_room, refusal
from compressor.errors import CheckError, InputError
from compressor.evaluate.perplexity import EvaluationResult, evaluate
from compressor.evaluate.settings import Evaluation
from compressor.plan.calibration import Calibration
from compressor.run.audit import Audited, Progress, SweepOptions, audit
from compressor.run.environment import versions
from compressor.run.tokens import calibration_tokens, evaluation_tokens
from compressor.runner.source_model import SourceModel
from compressor.runner.tokenizer import load_tokenizer

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
    source = _editable(model)
    for error in (
        refusal(output, manifest=MANIFEST_NAME),
        lacking_room(output, source.checkpoint.nbytes),
    ):
        if error is not None:
            raise error
    tokens = evaluation_tokens(
        load_tokenizer(source.checkpoint.folder), _fitting(held_out, source), calibration=None
    ).ids
    before = audit(model, sweep=sweep, device=device, stage=stage, progress=progress)
    bad = next((found for found in before.findings if found.check == "finite"), None)
    if bad is not None:
        raise InputError(
            f"{bad.tensor}: {bad.message}",
            hint="the model is damaged, which resetting rows does not mend: get it again",
        )
    rows = suspect_rows(source, before)
    if not rows:
        return Sanitized(output, before, rows)
    followed = tuple(sorted({i for ids in rows.values() for i in ids}))

    def look(edited: Source) -> Audit:
        return audit(
            replace(model, checkpoint=edited.checkpoint, source=edited),
            sweep=replace(sweep, followed=followed),
            device=device,
            stage=stage,
            progress=progress,
        )

    def measure(edited: Source) -> EvaluationResult:
        return evaluate(
            edited,
            tokens,
            device=device,
            dtype=_dtype(source, device),
            against=source,
            progress=progress,
        )

    base, pruned, columns = source, None, {}
    if prune is not None:
        with stage("prune", len(source.layout.blocks)):
            running = SourceModel(source, device=device, dtype=_dtype(source, device))
            clean = _clean_text(source, held_out)
            columns = idle_channels(running, clean, prune, batch=8, progress=progress)
        tried = replace(source, checkpoint=pruned_checkpoint(source.checkpoint, columns))
        with stage("perplexity", len(source.layout.units)):
            ratio = measure(tried).perplexity_ratio
        assert ratio is not None
        left = _suspects(look(tried))
        pruned = Pruned(prune, _suspects(before), left, ratio.value, max_ppl_ratio)
        base, columns = (tried, columns) if pruned.kept else (source, {})
    edited = replace(base, checkpoint=reset_checkpoint(base.checkpoint, rows))
    after = look(edited)
    effects = _effects(rows, before, after)
    if effects and all(effect.nothing for effect in effects):
        raise CheckError(
            f"resetting {len(effects)} rows did nothing: each of these tokens is suspect as before",
            hint="nothing was written; what they do is not in their rows alone, so train the model "
            "anew from a source that you trust",
        )
    with stage("perplexity", len(source.layout.units)):
        measured = measure(edited)
    _hold(measured, max_ppl_ratio)
    with stage("write", len(source.layout.units)):
        write(
            ModelTarget(
                source=edited,
                format=edited.format,
                schemes=edited.schemes,
                dtype=source.checkpoint.dtype,
                container=Safetensors(max_shard_size),
            ),
            output,
            edited.read_unit,
            about=_about(model.name, source, rows, columns),
            beside=source.checkpoint.folder,
            progress=progress,
        )
    return Sanitized(output, before, rows, after, measured, pruned)


def suspect_rows(source: Source, found: Audit) -> dict[str, tuple[int, ...]]:
    """Table → rows to reset: those of suspect tokens in the embedding, and rows that are far too
    long in the table that has them."""
    rows: dict[str, set[int]] = {}
    if found.sweep is not None and found.sweep.suspects:
        ids = {token.id for token in found.sweep.suspects}
        rows = {name: set(ids) for name in _embedding(source)}
    for finding in found.findings:
        if finding.check == "rows" and finding.level == "suspect":
            table = source.checkpoint.read([finding.tensor])[finding.tensor]
            long = large_rows(row_norms(table)).tolist()
            rows.setdefault(finding.tensor, set()).update(long)
    return {name: tuple(sorted(ids)) for name, ids in rows.items()}


def _embedding(source: Source) -> list[str]:
    """Tables of the embedding that have a row for each token."""
    unit = next(unit for unit in source.layout.units if unit.kind == "embedding")
    size = vocabulary(source.checkpoint.config)
    shapes = source.checkpoint.shapes
    found = [n for n in unit.tensors if len(shapes[n]) == 2 and shapes[n][0] == size]
    if not found:
        raise InputError("no table of the embedding has a row for each token (vocab_size)")
    return found


def _editable(model: Audited) -> Source:
    source = model.source
    if source is None:
        raise InputError(
            f"{model.name} is an encoder, which is audited but not written",
            hint="compress audit names the tokens; models with an architecture map are sanitized",
        )
    if source.low_precision:
        raise InputError(
            f"{model.name} holds {source.low_precision}, not floats",
            hint="sanitize the float model, then quantize it",
        )
    return source


def _fitting(wanted: Evaluation, source: Source) -> Evaluation:
    """Rows no longer than the model has positions for."""
    positions = source.layout.sizes.positions
    if positions is None or wanted.length <= positions:
        return wanted
    return wanted.model_copy(update={"length": positions})


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


def _clean_text(source: Source, held_out: Evaluation) -> Tensor:
    """Rows of the part of the text that nothing is measured on, as many as of the other."""
    fitting = _fitting(held_out, source)
    wanted = Calibration(data=held_out.data, samples=fitting.windows, length=fitting.length)
    return calibration_tokens(load_tokenizer(source.checkpoint.folder), wanted, seed=0).ids


def _dtype(source: Source, device: torch.device) -> torch.dtype:
    return source.checkpoint.dtype if device.type == "cuda" else torch.float32


def _suspects(found: Audit) -> int:
    return 0 if found.sweep is None else len(found.sweep.suspects)


def _about(
    name: str,
    source: Source,
    rows: Mapping[str, tuple[int, ...]],
    columns: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """What decides the bytes of the result."""
    files = sorted({entry.file for entry in source.checkpoint.entries.values()})
    return {
        "sanitize": {
            "reset_to": "mean",
            "rows": {n: list(ids) for n, ids in rows.items()},
            **({"silenced": {n: list(ids) for n, ids in columns.items()}} if columns else {}),
        },
        "source": {"name": name, "files": {f.name: hash_file(f).sha256 for f in files}},
        "versions": versions(),
    }
