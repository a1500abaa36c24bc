"""A delta and its base as one dense checkpoint, which is read like any other.

Weights are added up when they are asked for, so nothing that evaluates, converts or compares
checkpoints needs to know of deltas.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.delta.base import (
    BaseRecord,
    decoded,
    delta_shapes,
    locate_base,
    read_base_record,
    stored_names,
)
from compressor.checkpoint.hashed_reads import hash_of_bytes
from compressor.checkpoint.reader import Checkpoint, load_json, open_checkpoint
from compressor.checkpoint.safetensors import Entry
from compressor.checkpoint.source import Source, as_source, open_source
from compressor.checkpoint.wrapper import Wrapper
from compressor.errors import InputError, Problems
from compressor.ir.layout import Linear, weight_name
from compressor.ir.tensor import TensorShape
from compressor.numerics.bitdelta import SCALES, SIGNS, SignDelta


@dataclass(frozen=True, slots=True)
class Delta:
    """An opened delta, of which nothing but headers has been read.

    bits      module path of a linear → signs for each weight
    borrowed  tensors it takes from the base
    """

    checkpoint: Checkpoint
    record: BaseRecord
    bits: Mapping[str, int]
    borrowed: tuple[str, ...]

    def read(self, linear: Linear) -> SignDelta:
        """The difference of one linear."""
        names = (f"{linear.name}.{SIGNS}", f"{linear.name}.{SCALES}")
        tensors = self.checkpoint.read(names)
        scales = tensors[names[1]]
        if not bool(torch.isfinite(scales).all()):
            raise InputError(f"{names[1]} holds NaN or infinity", hint="the delta is damaged")
        return SignDelta(tensors[names[0]], scales, linear.in_features)


def is_delta(folder: Path) -> bool:
    """Whether a checkpoint folder declares itself a delta."""
    if not (folder / "config.json").is_file():
        return False
    config = load_json(folder / "config.json", what="config")
    declared = config.get("quantization_config")
    return isinstance(declared, dict) and declared.get("quant_method") == "bitdelta"


def open_delta(folder: Path) -> Delta:
    """Open a delta folder. Raises InputError, or Problems with all that is wrong."""
    checkpoint = open_checkpoint(folder)
    if not is_delta(folder):
        raise InputError(f"{folder} is not a delta", hint="deltas are written by the pass bitdelta")
    declared = checkpoint.config["quantization_config"]
    borrowed = declared.get("borrowed")
    if not isinstance(borrowed, list) or not all(isinstance(name, str) for name in borrowed):
        raise InputError("config.json of the delta does not list what it borrows from its base")
    leaves: dict[str, dict[str, TensorShape]] = {}
    for name, entry in checkpoint.entries.items():
        path, _, leaf = name.rpartition(".")
        if leaf in (SIGNS, SCALES):
            leaves.setdefault(path, {})[leaf] = entry.spec
    problems: list[Any] = []
    bits: dict[str, int] = {}
    for path, found in leaves.items():
        missing = sorted({SIGNS, SCALES} - set(found))
        if missing:
            problems.append(InputError(f"the delta lacks {path}.{missing[0]}"))
        elif len(found[SIGNS].shape) != 3:
            problems.append(InputError(f"{path}.{SIGNS} is not [bits, words, outputs]"))
        else:
            bits[path] = found[SIGNS].shape[0]
    if problems:
        raise Problems(problems)
    return Delta(checkpoint, read_base_record(folder), bits, tuple(borrowed))


@dataclass(frozen=True, slots=True)
class MergedCheckpoint(Wrapper):
    """A dense fine-tune that exists only when it is read; `entries` lie in no file."""

    delta: Delta
    base: Source

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = 4
    ) -> dict[str, Tensor]:
        """The named tensors on the CPU. Raises InputError where the base is not the delta's."""
        wanted = list(names)
        linears = {x.weight_name: x for x in self.base.layout.linears}
        stored = [name for name in wanted if name in self.delta.checkpoint.entries]
        borrowed = [name for name in wanted if name in self.delta.borrowed]
        found = self.delta.checkpoint.read(stored, pin=pin, threads=threads)
        found |= self.checked(borrowed)
        for name in wanted:
            if name not in found:
                dtype, linear = self.entry(name).spec.dtype, linears[name]
                weight = self.delta.read(linear).merged(self.base_weight(linear), dtype)
                found[name] = weight.T.contiguous() if linear.transposed else weight
        return {name: found[name] for name in wanted}

    def in_files(self, names: Iterable[str], *, pin: bool = False) -> dict[str, Tensor]:
        """What the delta's own files hold."""
        linears = {x.weight_name: x for x in self.base.layout.linears if x.name in self.delta.bits}
        found: list[str] = []
        for name in names:
            if name in linears:
                found += delta_shapes(linears[name], 1)
            elif name in self.delta.checkpoint.entries:
                found.append(name)
        return self.delta.checkpoint.read(found, pin=pin)

    def stored_entries(self) -> list[Entry]:
        """Those of the delta and of its base."""
        every = (self.delta.checkpoint, self.base.checkpoint)
        return [entry for checkpoint in every for entry in checkpoint.stored_entries()]

    def base_weight(self, linear: Linear) -> Tensor:
        """The base's weight [out, in] of a linear, decoded, after a check of its stored bytes."""
        return decoded(self.base, linear, self.checked(stored_names(self.base, linear)))

    def checked(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the base as they are stored, if they are those the delta was made from."""
        tensors = self.base.checkpoint.read(names)
        for name, tensor in tensors.items():
            if hash_of_bytes(tensor) != self.delta.record.tensors.get(name):
                raise InputError(
                    f"{self.base.checkpoint.folder} is not the base of this delta: "
                    f"{name} holds other values",
                    hint=f"the delta was made from {base_name(self.delta.record)}",
                )
        return tensors


def base_name(record: BaseRecord) -> str:
    """A base for people."""
    name = record.identity.get("name", "an unnamed checkpoint")
    revision = record.identity.get("revision")
    short = record.fingerprint[:12]
    return f"{name}@{revision} ({short})" if revision else f"{name} (fingerprint {short})"


def merged_source(delta: Delta, base: Source) -> Source:
    """The dense fine-tune. Raises InputError, or Problems, where the two do not fit together."""
    return as_source(merge(delta, base))


def merge(delta: Delta, base: Source) -> MergedCheckpoint:
    """Its checkpoint."""
    _check_names(delta, base)
    linears = {linear.name: linear for linear in base.layout.linears}
    dtype = delta.checkpoint.dtype
    entries: dict[str, Entry] = {}
    problems: list[Any] = []

    def virtual(name: str, spec: TensorShape) -> None:
        entries[name] = Entry(file=Path(), spec=spec, begin=0, end=spec.nbytes)

    for name, entry in delta.checkpoint.entries.items():
        if name.rpartition(".")[2] not in (SIGNS, SCALES):
            virtual(name, entry.spec)
    for name in delta.borrowed:
        virtual(name, base.checkpoint.entry(name).spec)
    for name, bits in delta.bits.items():
        if name not in linears:
            problems.append(InputError(f"the base has no {name}, of which the delta holds signs"))
            continue
        for full, spec in delta_shapes(linears[name], bits).items():
            found = delta.checkpoint.entries[full].spec
            if found != spec:
                problems.append(
                    InputError(
                        f"{full} is {list(found.shape)}, but the base's weight of "
                        f"{list(linears[name].shape)} needs {list(spec.shape)}",
                        hint="the delta is damaged, or was made from a base of another size",
                    )
                )
        shape = linears[name].shape
        shape = shape[::-1] if linears[name].transposed else shape
        virtual(weight_name(name), TensorShape(dtype, shape))
    if problems:
        raise Problems(problems)
    config = {k: v for k, v in delta.checkpoint.config.items() if k != "quantization_config"}
    return MergedCheckpoint(
        folder=delta.checkpoint.folder, config=config, entries=entries, delta=delta, base=base
    )


def _check_names(delta: Delta, base: Source) -> None:
    """The base has the tensors that the record lists; their bytes are compared when read."""
    known, found = set(delta.record.tensors), set(base.checkpoint.entries)
    absent = [name for name in delta.borrowed if name not in known]
    if absent:
        raise InputError(f"the delta borrows {absent[0]}, which is not in its record of the base")
    if delta.record.model_type != base.layout.model_type or known != found:
        other = sorted(known ^ found)
        what = f"{other[0]} is in one only" if other else f"it is a {base.layout.model_type}"
        raise InputError(
            f"{base.checkpoint.folder} is not the base of this delta: {what}",
            hint=f"the delta was made from {base_name(delta.record)}",
        )


def open_model(folder: Path, *, base: str | Source | None = None) -> Source:
    """A checkpoint folder, or a delta with its base: the one named or given, or the recorded one.

    A recorded base is looked for on the Hub where it came from there, else beside the delta.
    Raises InputError where it is not found, or is another one.
    """
    if not is_delta(folder):
        if base is not None:
            raise InputError(f"{folder} is not a delta, so it needs no base")
        return open_source(folder)
    delta = open_delta(folder)
    return merged_source(delta, find_base(delta, base))


def find_base(delta: Delta, named: str | Source | None) -> Source:
    """The base of a delta: the one named or given, or the recorded one."""
    if isinstance(named, Source):
        return named
    if named is not None:
        return locate_base(named, fetch=True).source
    identity = delta.record.identity
    name, revision = identity.get("name", ""), identity.get("revision")
    if revision:
        return locate_base(f"{name}@{revision}", fetch=True).source
    beside = delta.checkpoint.folder.resolve().parent / Path(name).name
    if name and beside.is_dir():
        return open_source(beside)
    raise InputError(
        f"the base of this delta, {base_name(delta.record)}, is not at {beside}",
        hint="name its folder with --base",
    )
