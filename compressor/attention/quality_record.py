"""What a run recorded of its attention policy's worth on held-out text, so that anyone can measure
it again from the files."""

import json
from pathlib import Path
from typing import Any

from compressor_calibration.documents import DataError
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import TokenSet, make_tokens
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from compressor.attention.policy import AttentionPolicy
from compressor.attention.quality import measure_policies
from compressor.attention.rule import Value
from compressor.checkpoint.reader import load_json
from compressor.errors import InputError
from compressor.ir.frozen import messages
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Progress

RECORD_NAME = "attention_quality.json"
TOLERANCE, QUANTIZED_TOLERANCE = 0.02, 0.1
"""How far a layer's shares may be from the recorded ones: with the weights that were measured only
rounding differs; later passes that quantize them change what attention sees."""


class LayerShares(Value):
    """Of one layer, means over its query heads; and of each head, where a record has them."""

    seen: float
    mass: float
    seen_by_head: tuple[float, ...] = Field((), strict=False)
    mass_by_head: tuple[float, ...] = Field((), strict=False)


class QualityRecord(Value):
    """Shares by layer, and the held-out text that they were measured on; sha256 of its tokens."""

    model_config = ConfigDict(strict=False)

    version: int = 1
    text: str = "bundled novel, held out, consecutive rows"
    rows: int
    length: int
    sha256: str
    layers: tuple[LayerShares, ...]

    @property
    def means(self) -> LayerShares:
        """Over all layers."""
        count = len(self.layers)
        return LayerShares(
            seen=sum(layer.seen for layer in self.layers) / count,
            mass=sum(layer.mass for layer in self.layers) / count,
        )

    def to_bytes(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()


def held_out(tokenizer: Any, *, rows: int, length: int) -> TokenSet:
    """Rows of the bundled novel. Raises InputError where it is too short for them."""
    try:
        return make_tokens(
            tokenizer,
            read_documents("bundled/fiction", part="held_out"),
            samples=rows,
            length=length,
            sampling="consecutive",
            seed=0,
        )
    except DataError as error:
        raise InputError(f"held-out text: {error}", hint=error.hint) from error


def record_quality(
    model: SourceModel,
    policy: AttentionPolicy,
    *,
    rows: int,
    length: int,
    progress: Progress = lambda name, done, total: None,
) -> QualityRecord:
    """Measure a policy on held-out text."""
    tokens = held_out(model.tokenizer(), rows=rows, length=length)
    (found,) = measure_policies(model, [policy], tokens.ids, progress=progress)
    return QualityRecord(
        rows=rows,
        length=length,
        sha256=tokens.sha256,
        layers=tuple(
            LayerShares(
                seen=float(seen.mean()),
                mass=float(mass.mean()),
                seen_by_head=_by_head(seen),
                mass_by_head=_by_head(mass),
            )
            for seen, mass in zip(found.seen, found.mass, strict=True)
        ),
    )


def _by_head(shares: Tensor) -> tuple[float, ...]:
    return tuple(round(float(share), 4) for share in shares)


def read_record(folder: Path) -> QualityRecord | None:
    """The record beside a checkpoint, or None. Raises InputError for one that is not valid."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        return QualityRecord.model_validate(load_json(path, what="record"))
    except ValidationError as error:
        raise InputError(f"{path}: {'; '.join(messages(error))}") from error


def check_record(
    model: SourceModel, policy: AttentionPolicy, record: QualityRecord, *, quantized: bool
) -> list[str]:
    """Where a policy sees another share of keys, or of attention, than was recorded."""
    again = record_quality(model, policy, rows=record.rows, length=record.length)
    if again.sha256 != record.sha256:
        return ["the held-out text gives other tokens than when attention was recorded"]
    if len(again.layers) != len(record.layers):
        return [f"{len(record.layers)} layers are recorded, the policy has {len(again.layers)}"]
    limit = QUANTIZED_TOLERANCE if quantized else TOLERANCE
    problems = []
    for number, (was, now) in enumerate(zip(record.layers, again.layers, strict=True)):
        for name, what in (("seen", "keys"), ("mass", "attention")):
            # A head is a mean of fewer choices than its layer.
            heads = zip(
                getattr(was, f"{name}_by_head"), getattr(now, f"{name}_by_head"), strict=False
            )
            pairs = [("", limit, getattr(was, name), getattr(now, name))]
            pairs += [(f", head {n}", 2 * limit, *pair) for n, pair in enumerate(heads)]
            problems += [
                f"layer {number}{where}: the share of {what} that is seen was recorded as "
                f"{before:.3f} and is {after:.3f}"
                for where, far, before, after in pairs
                if not abs(before - after) <= far
            ]
    return problems
