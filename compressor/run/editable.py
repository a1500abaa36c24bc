"""Models whose tensors are edited: decoders by their map, encoders as transformers makes them. What
an edit costs is measured in perplexity, an encoder's in that of masked words.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.arch.sizes import vocabulary
from compressor.audit.prune import idle_channels, idlest
from compressor.checkpoint.as_stored import StoredTarget
from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.reader import Checkpoint, read_entries
from compressor.checkpoint.source import Source
from compressor.checkpoint.target import ModelTarget, Target
from compressor.errors import InputError
from compressor.evaluate.perplexity import EvaluationResult, compared, evaluate
from compressor.evaluate.settings import Evaluation
from compressor.ir.layout import UnitLayout
from compressor.ir.unit import Unit
from compressor.plan.calibration import Calibration
from compressor.run.audit import Audited, PlainTokenizer, around
from compressor.run.tokens import calibration_tokens, evaluation_tokens
from compressor.runner.encoder import Encoder, load_encoder, masked_nll, mean_inputs
from compressor.runner.execution import Progress
from compressor.runner.source_model import SourceModel
from compressor.runner.tokenizer import load_tokenizer

ROUNDS = 6
"""One in so many of an encoder's tokens is masked at a time, about as BERT was trained."""


Written = tuple[Target, Callable[[UnitLayout], Unit], Mapping[str, bytes]]
"""How an edited checkpoint is written: target, units, and files as they are."""


class Editable(Protocol):
    """A model, and text that edits of it are measured on."""

    audited: Audited

    def tables(self) -> list[str]:
        """Tables with a row for each token. Raises InputError where there is none."""

    def edited(self, checkpoint: Checkpoint) -> Audited:
        """The model with the tensors of an edited checkpoint."""

    def measure(self, checkpoint: Checkpoint, progress: Progress) -> EvaluationResult:
        """An edited checkpoint on held-out text, beside the original."""

    def idle(self, share: float, progress: Progress) -> dict[str, tuple[int, ...]]:
        """Weight of each MLP's last linear → the `share` of its inputs that other text uses least.
        Raises InputError where channels cannot be silenced one by one."""

    def written(self, checkpoint: Checkpoint, max_shard_size: int) -> Written:
        """How an edited checkpoint is written."""


def editable(model: Audited, held_out: Evaluation, *, device: torch.device) -> Editable:
    """A model by what it is. Raises InputError for weights that are no floats, and text that is too
    short."""
    if model.source is not None:
        if model.source.low_precision:
            raise _no_floats(model.name, model.source.low_precision)
        return Decoder(model, model.source, held_out, device)
    if "quantization_config" in model.checkpoint.config:
        raise _no_floats(model.name, "quantized weights")
    return MaskedEncoder(model, held_out, device)


def _no_floats(name: str, what: str) -> InputError:
    return InputError(
        f"{name} holds {what}, not floats", hint="sanitize the float model, then quantize it"
    )


class Decoder:
    """A model with a map."""

    def __init__(
        self, audited: Audited, source: Source, held_out: Evaluation, device: torch.device
    ) -> None:
        self.audited, self.source, self.device = audited, source, device
        self.dtype = source.checkpoint.running_dtype(device)
        positions = source.layout.sizes.positions
        if positions is not None and held_out.length > positions:
            held_out = held_out.model_copy(update={"length": positions})
        self.held_out = held_out
        self.tokenizer = load_tokenizer(source.checkpoint.folder)
        self.tokens = evaluation_tokens(self.tokenizer, held_out, calibration=None).ids

    def tables(self) -> list[str]:
        unit = next(unit for unit in self.source.layout.units if unit.kind == "embedding")
        size, shapes = vocabulary(self.source.checkpoint.config), self.source.checkpoint.shapes
        found = [n for n in unit.tensors if len(shapes[n]) == 2 and shapes[n][0] == size]
        if not found:
            raise InputError("no table of the embedding has a row for each token (vocab_size)")
        return found

    def edited(self, checkpoint: Checkpoint) -> Audited:
        source = replace(self.source, checkpoint=checkpoint)
        return replace(self.audited, checkpoint=checkpoint, source=source)

    def measure(self, checkpoint: Checkpoint, progress: Progress) -> EvaluationResult:
        return evaluate(
            replace(self.source, checkpoint=checkpoint),
            self.tokens,
            device=self.device,
            dtype=self.dtype,
            against=self.source,
            progress=progress,
        )

    def idle(self, share: float, progress: Progress) -> dict[str, tuple[int, ...]]:
        running = SourceModel(self.source, device=self.device, dtype=self.dtype)
        ids = calibration_tokens(self.tokenizer, _other_text(self.held_out), seed=0).ids
        return idle_channels(running, ids, share, batch=8, progress=progress)

    def written(self, checkpoint: Checkpoint, max_shard_size: int) -> Written:
        source = replace(self.source, checkpoint=checkpoint)
        target = ModelTarget(
            source=source,
            format=source.format,
            schemes=source.schemes,
            dtype=checkpoint.dtype,
            container=Safetensors(max_shard_size),
        )
        return target, source.read_unit, {}


class MaskedEncoder:
    """An encoder with a head for masked words."""

    def __init__(self, audited: Audited, held_out: Evaluation, device: torch.device) -> None:
        self.audited, self.device = audited, device
        self.dtype = audited.checkpoint.running_dtype(device)
        encoder = self.original
        heads = [name for name in encoder.missing if "." in name]
        if heads:
            raise InputError(
                f"{audited.name} has no head for masked words ({heads[0]} is missing), and nothing "
                "else says what a reset costs",
                hint="sanitize the pretrained model that it was made of",
            )
        tokenizer = load_tokenizer(audited.checkpoint.folder)
        if type(tokenizer.mask_token_id) is not int:
            raise InputError(f"the tokenizer of {audited.name} has no token that masks")
        self.mask_id: int = tokenizer.mask_token_id
        first, last = around(tokenizer)
        positions = getattr(encoder.model.config, "max_position_embeddings", held_out.length)
        # RoBERTa's positions begin behind that of padding.
        room = min(held_out.length, positions - 2) - len(first) - len(last)
        self.held_out = held_out.model_copy(update={"length": room})
        self._tokenizer = PlainTokenizer(tokenizer)
        self._ends = [torch.tensor(end, dtype=torch.int64) for end in (first, last)]
        inner = evaluation_tokens(self._tokenizer, self.held_out, calibration=None).ids
        drawn = torch.rand(inner.shape, generator=torch.Generator().manual_seed(0))
        self.tokens = self._framed(inner)
        self.round = torch.full_like(self.tokens, -1)
        self.round[:, len(first) : len(first) + room] = drawn.argsort(1) % ROUNDS

    @cached_property
    def original(self) -> Encoder:
        """The model as it came."""
        return self._load(self.audited.checkpoint)

    def _load(self, checkpoint: Checkpoint) -> Encoder:
        return load_encoder(checkpoint, device=self.device, dtype=self.dtype, masked_words=True)

    def _framed(self, ids: Tensor) -> Tensor:
        first, last = (end.expand(len(ids), -1) for end in self._ends)
        return torch.cat([first, ids, last], dim=1)

    def tables(self) -> list[str]:
        return [self.original.table]

    def edited(self, checkpoint: Checkpoint) -> Audited:
        return replace(self.audited, checkpoint=checkpoint)

    def measure(self, checkpoint: Checkpoint, progress: Progress) -> EvaluationResult:
        models = self._load(checkpoint), self.original
        ours, original = torch.zeros(2, *self.tokens.shape, dtype=torch.float64)
        for number in range(ROUNDS):
            masked = self.round == number
            shown = self.tokens.masked_fill(masked, self.mask_id)
            for encoder, found in zip(models, (ours, original), strict=True):
                found += masked_nll(encoder, shown, self.tokens, masked)
            progress("masked words", number + 1, ROUNDS)
        return compared(ours, original, counted=self.round >= 0)

    def idle(self, share: float, progress: Progress) -> dict[str, tuple[int, ...]]:
        ids = calibration_tokens(self._tokenizer, _other_text(self.held_out), seed=0).ids
        found = mean_inputs(self.original, self._framed(ids))
        if not found:
            raise InputError(
                f"{self.audited.name} has no MLP whose channels can be silenced one by one",
                hint="leave out --prune",
            )
        return {name: idlest(size, share) for name, size in found.items()}

    def written(self, checkpoint: Checkpoint, max_shard_size: int) -> Written:
        def read(part: UnitLayout) -> Unit:
            return Unit(layout=part, tensors=checkpoint.read(part.tensors))

        config = (checkpoint.folder / "config.json").read_bytes()
        target = StoredTarget(checkpoint.folder, read_entries(checkpoint.folder))
        return target, read, {"config.json": config}


def _other_text(held_out: Evaluation) -> Any:
    """Rows of the part of the text that nothing is measured on, as many as of the other."""
    return Calibration(data=held_out.data, samples=held_out.windows, length=held_out.length)
