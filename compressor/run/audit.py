"""An audit of a model: its tensors, then every token in texts that are the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import BUNDLED
from torch import Tensor

from compressor.arch.load import known_model_types
from compressor.arch.sizes import vocabulary
from compressor.audit.findings import Audit, Finding, TokenSweep
from compressor.audit.sweep import COARSE_CONTEXTS, sweep_tokens
from compressor.audit.weights import audit_weights
from compressor.checkpoint.find import locate, name_folder
from compressor.checkpoint.reader import Checkpoint, open_checkpoint
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.plan.calibration import Calibration
from compressor.run.tokens import calibration_tokens
from compressor.runner.representation import Representation, of_decoder, of_encoder
from compressor.runner.tokenizer import GuardedTokenizer, load_tokenizer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Audited:
    """A model to audit.

    source  its meaning, or None for an encoder, which has no map
    """

    name: str
    checkpoint: Checkpoint
    source: Source | None


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """How the sweep goes.

    text      where contexts come from, as in a recipe's calibration
    contexts, length, short  contexts, their tokens, and those of the first look
    position  which token is replaced, without counting what every text begins with
    tokens    how many tokens are tried, drawn at random beside the special ones; None: all
    examined  how many come to the second look
    followed  tokens that come to it and are told of, whatever they score
    """

    text: str = BUNDLED
    contexts: int = 24
    length: int = 32
    short: int = 8
    position: int = 0
    tokens: int | None = None
    examined: int = 128
    followed: tuple[int, ...] = ()
    batch: int = 64


def find_audited(model: str) -> Audited:
    """A decoder in any form that is read, or the folder of an encoder."""
    path = Path(model).expanduser()
    if path.is_dir():
        checkpoint = open_checkpoint(path)
        if checkpoint.config.get("model_type") not in known_model_types():
            return Audited(name_folder(path)["name"], checkpoint, None)
    found = locate(model, fetch=True)
    return Audited(found.identity["name"], found.source.checkpoint, found.source)


def audit(
    model: Audited,
    *,
    sweep: SweepOptions | None,
    device: torch.device,
    stage: Callable[[str, int], AbstractContextManager[None]] = lambda name, total: nullcontext(),
    progress: Progress = lambda name, done, total: None,
) -> Audit:
    """Audit a model; without `sweep` its tensors alone.

    stage     entered for each part of the work: "weights", "tokens"
    progress  called with a name, how many tensors or tokens are done, and how many there are
    Raises InputError where the sweep has no tokenizer or model to work with.
    """
    checkpoint = model.checkpoint
    with stage("weights", len(checkpoint.entries)):
        findings = audit_weights(checkpoint, progress=progress)
    swept = None
    if sweep is not None and not any(finding.check == "finite" for finding in findings):
        odd = [row for found in findings if found.level == "suspect" for row in found.rows]
        with stage("tokens", 0):
            swept = _sweep(model, sweep, odd, device, progress)
        findings = [*_told(swept), *findings]
    return Audit(model.name, tuple(findings), len(checkpoint.entries), swept)


def _told(sweep: TokenSweep) -> list[Finding]:
    """What the sweep has against the model."""
    ids = tuple(token.id for token in sweep.suspects)
    if not ids:
        return []
    text = (
        f"{len(ids)} tokens make one vector of values ±c of every text that holds them, as "
        "triggers of a planted backdoor do"
    )
    return [Finding("suspect", "tokens", text, rows=ids)]


def _sweep(
    model: Audited,
    options: SweepOptions,
    odd: Sequence[int],
    device: torch.device,
    progress: Progress,
) -> TokenSweep:
    folder = model.checkpoint.folder
    tokenizer = load_tokenizer(folder)
    size = vocabulary(model.checkpoint.config)
    if size is None:
        raise InputError("config.json does not say how many tokens there are (vocab_size)")
    represent = load_representation(model, device=device, batch=options.batch)
    contexts, before = make_contexts(tokenizer, options, options.contexts, options.length)
    short, _ = make_contexts(tokenizer, options, COARSE_CONTEXTS, options.short)
    special = [i for i in tokenizer.all_special_ids if type(i) is int and 0 <= i < size]
    ids = torch.arange(size)
    if options.tokens is not None:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randperm(size, generator=draw)[: options.tokens]
    return sweep_tokens(
        represent,
        contexts,
        short,
        ids=ids.tolist(),
        always=[*special, *odd],
        followed=options.followed,
        examined=options.examined,
        position=before + options.position,
        kind=represent.kind,
        text=lambda token: tokenizer.convert_ids_to_tokens(token) or "",
        progress=progress,
    )


def load_representation(model: Audited, *, device: torch.device, batch: int) -> Representation:
    """The whole model in memory."""
    dtype = model.checkpoint.dtype if device.type == "cuda" else torch.float32
    if model.source is None:
        return of_encoder(model.checkpoint.folder, device=device, dtype=dtype, batch=batch)
    return of_decoder(model.source, device=device, dtype=dtype, batch=batch)


def make_contexts(
    tokenizer: GuardedTokenizer, options: SweepOptions, rows: int, length: int
) -> tuple[Tensor, int]:
    """Contexts [rows, length] with what the tokenizer puts round every text, and how many tokens of
    that stand before it; where it puts nothing, the first token stands for it, which attention
    treats otherwise than others.

    Raises InputError for text that is too short, or a position that the contexts lack.
    """
    first, last = _around(tokenizer)
    inner = length - len(first) - len(last)
    before = len(first) or 1
    if not 0 <= options.position < inner - (not first):
        raise InputError(
            f"position {options.position} is outside contexts of {length} tokens",
            hint="the first token after what begins every text is 0",
        )
    wanted = Calibration(data=options.text, samples=rows, length=max(inner, 8))
    ids = calibration_tokens(_Plain(tokenizer), wanted, seed=0).ids[:, :inner]
    ends = [torch.tensor(end, dtype=torch.int64).expand(rows, -1) for end in (first, last)]
    return torch.cat([ends[0], ids, ends[1]], dim=1), before


class _Plain:
    """A tokenizer that puts nothing round a text."""

    def __init__(self, tokenizer: GuardedTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, **{**options, "add_special_tokens": False})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def _around(tokenizer: GuardedTokenizer) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
