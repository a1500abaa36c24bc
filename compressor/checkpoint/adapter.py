"""The first and last blocks of a model, tuned on an emulator, in the forms in which they come: a
folder that `unplug` wrote, the tuned emulator itself, LoRA weights for it, or the published code's
adapter.pt. Whatever the form, names are those of the full model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.checkpoint.as_stored import AsTheyAre
from compressor.checkpoint.container import Container, Shard, ShardLayout
from compressor.checkpoint.kept_blocks import block_of
from compressor.checkpoint.lora import lora_deltas
from compressor.checkpoint.numbered import numbered_tensors, under_names
from compressor.checkpoint.offsite import (
    OFFSITE_NAME,
    OffsiteRecord,
    adapter_blocks,
    read_offsite_record,
    stored,
)
from compressor.checkpoint.reader import ADAPTER_NAME
from compressor.checkpoint.safetensors import encode_header, read_header, read_tensor
from compressor.checkpoint.source import Source, open_source
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout
from compressor.ir.tensor import TensorShape

WEIGHTS_NAME = "adapter.safetensors"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was found.

    what     what to call it
    shapes   name in the full model → shape;  read  the tensor of a name, on the CPU
    record   of the full model, or None where nothing says which it is
    pads     blocks at both ends
    beside   tensors outside its blocks that came with it and are to be the full model's own
    middle   tensors of an emulator's other blocks that were the full model's, by their names there
    added    whether tensors are added to the full model's and not put in their place
    """

    what: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    record: OffsiteRecord | None
    pads: tuple[int, int]
    beside: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    middle: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    added: bool = False


def open_adapter(
    path: Path,
    base: Source,
    *,
    emulator: Path | None = None,
    pads: tuple[int, int] | None = None,
    unpickle: bool = False,
) -> Adapter:
    """Find an adapter for a full model.

    emulator  folder whose offsite.json says which blocks are the adapter's, where `path` has none
    pads      the same for files that have none
    Raises InputError for what is no adapter.
    """
    if path.is_file():
        return _of_file(path, base, emulator=emulator, pads=pads, unpickle=unpickle)
    if not path.is_dir():
        raise InputError(f"there is no adapter at {path}")
    record = read_offsite_record(path) or _recorded(emulator)
    if record is None:
        raise InputError(
            f"{path} has no {OFFSITE_NAME}, which says whose adapter it is",
            hint="trainers don't copy it: name the emulator that was tuned with --emulator FOLDER",
        )
    if (path / WEIGHTS_NAME).is_file():
        entries = read_header(path / WEIGHTS_NAME)
        shapes = {name: entry.spec.shape for name, entry in entries.items()}
        return Adapter(
            path.name, shapes, lambda name: read_tensor(entries[name]), record, record.pads
        )
    if (path / ADAPTER_NAME).is_file() and not (path / "config.json").is_file():
        return _of_lora(path, base, record)
    return of_emulator(open_source(path), [block.name for block in base.layout.blocks], record)


def of_emulator(source: Source, blocks: Sequence[str], record: OffsiteRecord) -> Adapter:
    """The adapter of a tuned emulator; `blocks` are the names of the full model's."""
    path = source.checkpoint.folder
    if len(source.layout.blocks) != len(record.kept):
        raise InputError(
            f"{path} has {len(source.layout.blocks)} blocks, its record tells of "
            f"{len(record.kept)}",
            hint="name the folder of the emulator that it was tuned on with --emulator",
        )
    checkpoint = stored(source)
    own = {
        number: blocks[block]
        for number, block in enumerate(record.kept)
        if block in record.adapter_blocks and block < len(blocks)
    }
    names: dict[str, str] = {}
    beside: dict[str, Callable[[], Tensor]] = {}
    middle: dict[str, Callable[[], Tensor]] = {}
    kept = record.middle == "kept" and not source.low_precision
    for name in checkpoint.entries:
        number, local = block_of(source.arch, name)
        if number in own:
            names[f"{own[number]}.{local}"] = name
        elif number is None:
            beside[name] = _reader(source, name)
        elif kept and number < len(record.kept) and record.kept[number] < len(blocks):
            middle[f"{blocks[record.kept[number]]}.{local}"] = _reader(source, name)
    return Adapter(
        path.name,
        {ours: checkpoint.entries[name].spec.shape for ours, name in names.items()},
        lambda name: checkpoint.read([names[name]])[names[name]],
        record,
        record.pads,
        beside,
        middle,
    )


def _reader(source: Source, name: str) -> Callable[[], Tensor]:
    return lambda: stored(source).read([name])[name]


def _of_lora(path: Path, base: Source, record: OffsiteRecord) -> Adapter:
    deltas = lora_deltas(path)
    own = {record.kept.index(block): block for block in record.adapter_blocks}
    named: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        number, local = block_of(base.arch, name)
        block = None if number is None else own.get(number)
        if block is None or block >= len(base.layout.blocks):
            raise InputError(
                f"{path.name} tunes {name}, which is outside the adapter's blocks "
                f"{sorted(own)} of the emulator",
                hint="peft: LoraConfig(layers_to_transform=[...]) takes their numbers",
            )
        named[f"{base.layout.blocks[block].name}.{local}"] = delta
    shapes = {name: tuple(delta.shape) for name, delta in named.items()}
    return Adapter(path.name, shapes, named.__getitem__, record, record.pads, added=True)


def _of_file(
    path: Path,
    base: Source,
    *,
    emulator: Path | None,
    pads: tuple[int, int] | None,
    unpickle: bool,
) -> Adapter:
    record = _recorded(emulator)
    pads = record.pads if record is not None else pads
    if pads is None:
        raise InputError(
            f"{path.name} does not say which blocks it holds",
            hint="--pads 2,2 says how many of the first and last; --emulator FOLDER where it was "
            "tuned on an emulator from here",
        )
    tensors = numbered_tensors(path, unpickle=unpickle)
    numbers = adapter_blocks(len(base.layout.blocks), pads)
    found = under_names(tensors, [base.layout.blocks[i].name for i in numbers], what=path.name)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    return Adapter(path.name, shapes, found.__getitem__, record, pads)


def _recorded(emulator: Path | None) -> OffsiteRecord | None:
    if emulator is None:
        return None
    record = read_offsite_record(emulator)
    if record is None:
        raise InputError(f"{emulator} has no {OFFSITE_NAME}", hint="name an emulator's folder")
    return record


@dataclass(frozen=True)
class AdapterTarget(AsTheyAre):
    """An adapter as a file of its own with its record; one unit, which is all of it."""

    specs: Mapping[str, TensorShape]
    record: OffsiteRecord

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], record: OffsiteRecord) -> AdapterTarget:
        """The target of these tensors."""
        specs = {n: TensorShape(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
        return cls(specs, record)

    @property
    def units(self) -> Sequence[UnitLayout]:
        """All of it."""
        return [UnitLayout(name="adapter", kind="block", index=0, tensors=tuple(self.specs))]

    @property
    def container(self) -> Container:
        """One file."""
        return _OneFile()

    def shapes(self, unit: UnitLayout) -> dict[str, TensorShape]:
        """As they are."""
        return dict(self.specs)

    def config(self) -> dict[str, Any]:
        """It is no model."""
        return {}

    def files(self) -> dict[str, Any]:
        """Its record."""
        return {OFFSITE_NAME: self.record.to_json()}


class _OneFile:
    """adapter.safetensors."""

    def lay_out(self, groups: Sequence[Mapping[str, TensorShape]]) -> ShardLayout:
        """All tensors in one file."""
        tensors = {name: spec for group in groups for name, spec in group.items()}
        header, offsets = encode_header(tensors)
        return ShardLayout((Shard(WEIGHTS_NAME, tensors, offsets, {0: header}),))
