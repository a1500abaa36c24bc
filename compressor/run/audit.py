"""An audit of a model: its tensors, then every token in texts that are the model's own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.bundled import BUNDLED
from pydantic import TypeAdapter
from torch import Tensor

from compressor.arch.load import known_model_types
from compressor.arch.sizes import vocabulary
from compressor.audit.findings import Audit, Finding, TokenSweep
from compressor.audit.pace import paced
from compressor.audit.settings import AuditSettings
from compressor.audit.sweep import COARSE_CONTEXTS, COARSE_LENGTH, EXAMINED, sweep_tokens
from compressor.audit.weights import audit_weights
from compressor.checkpoint.durable import write_atomically
from compressor.checkpoint.find import Located, locate, name_folder
from compressor.checkpoint.reader import Checkpoint, open_checkpoint
from compressor.checkpoint.records import Records, stated_hash
from compressor.checkpoint.source import Source
from compressor.checkpoint.transaction import json_bytes
from compressor.errors import CheckError, InputError
from compressor.plan.calibration import Calibration
from compressor.report.audit import page_of
from compressor.run.settings import JobSettings
from compressor.run.tokens import calibration_tokens
from compressor.runner.execution import Progress
from compressor.runner.representation import Representation, of_decoder, of_encoder
from compressor.runner.tokenizer import GuardedTokenizer, load_tokenizer

RECORD = "audit.json"


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
    short: int = COARSE_LENGTH
    position: int = 0
    tokens: int | None = None
    examined: int = EXAMINED
    followed: tuple[int, ...] = ()
    batch: int = 64


def options_of(wanted: AuditSettings) -> SweepOptions | None:
    """How the sweep goes that a recipe asks for; None for tensors alone."""
    if wanted.weights_only:
        return None
    own = {"text", "contexts", "length", "position", "tokens"}
    return SweepOptions(**wanted.model_dump(include=own))


def audit_first(
    model: Audited, wanted: AuditSettings | None, work: Path, owner: str, settings: JobSettings
) -> Audit | None:
    """The audit of a run's model, before any other work, where a recipe asks for it.

    What it found is kept in the work folder for a run that goes on. Raises CheckError for a model
    that is suspect, if the recipe does not go on then, after audit.json and audit.html were written
    into the output folder; Interrupted when asked to stop.
    """
    if wanted is None or not wanted.looks_at("model"):
        return None
    sweep = options_of(wanted)
    kept = Records(work / "audit", stated_hash([owner, None if sweep is None else asdict(sweep)]))
    known = kept.get(RECORD)
    if known is not None:
        found = TypeAdapter(Audit).validate_python(known)
    else:

        def progress(name: str, done: int, total: int) -> None:
            settings.check_stop()
            told(f"audit, {name}", done, total)

        told = paced(settings.on_step)
        found = audit(model, sweep=sweep, device=settings.device, progress=progress)
        kept.put(RECORD, asdict(found))
    if found.suspect and wanted.fails:
        output = work.parent
        write_atomically(output / "audit.json", json_bytes(found.to_json()))
        write_atomically(output / "audit.html", page_of(found).encode())
        said = "; ".join(_said(f) for f in found.findings if f.level == "suspect")
        raise CheckError(
            f"audit: {found.name} is suspect: {said}",
            hint=f"nothing was compressed; {output / 'audit.html'} has the findings, compress "
            "sanitize resets tokens, audit: {fail_on: never} goes on all the same",
        )
    return found


def _said(finding: Finding) -> str:
    where = f"{finding.tensor}: " if finding.tensor else ""
    rows = f" ({', '.join(map(str, finding.rows))})" if finding.rows else ""
    return f"{where}{finding.message}{rows}"


def find_audited(model: str) -> Audited:
    """A decoder in any form that is read, or the folder of an encoder."""
    path = Path(model).expanduser()
    if path.is_dir():
        checkpoint = open_checkpoint(path)
        if checkpoint.config.get("model_type") not in known_model_types():
            return Audited(name_folder(path)["name"], checkpoint, None)
    return audited_of(locate(model, fetch=True))


def audited_of(found: Located) -> Audited:
    """A model that was found."""
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
    dtype = model.checkpoint.running_dtype(device)
    if model.source is None:
        return of_encoder(model.checkpoint, device=device, dtype=dtype, batch=batch)
    return of_decoder(model.source, device=device, dtype=dtype, batch=batch)


def make_contexts(
    tokenizer: GuardedTokenizer, options: SweepOptions, rows: int, length: int
) -> tuple[Tensor, int]:
    """Contexts [rows, length] with what the tokenizer puts round every text, and how many tokens of
    that stand before it; where it puts nothing, the first token stands for it, which attention
    treats otherwise than others.

    Raises InputError for text that is too short, or a position that the contexts lack.
    """
    first, last = around(tokenizer)
    inner = length - len(first) - len(last)
    before = len(first) or 1
    if not 0 <= options.position < inner - (not first):
        raise InputError(
            f"position {options.position} is outside contexts of {length} tokens",
            hint="the first token after what begins every text is 0",
        )
    wanted = Calibration(data=options.text, samples=rows, length=max(inner, 8))
    ids = calibration_tokens(PlainTokenizer(tokenizer), wanted, seed=0).ids[:, :inner]
    ends = [torch.tensor(end, dtype=torch.int64).expand(rows, -1) for end in (first, last)]
    return torch.cat([ends[0], ids, ends[1]], dim=1), before


class PlainTokenizer:
    """A tokenizer that puts nothing round a text."""

    def __init__(self, tokenizer: GuardedTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, **{**options, "add_special_tokens": False})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def around(tokenizer: GuardedTokenizer) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
