"""A fine-tune stored as its difference to a base: what is kept of which base, and what is left out.

The base is any checkpoint that can be read here, a quantized one as what its codes stand for. It is
known by the hash of each of its tensors as they are stored, so a wrong one is noticed at the first
tensor that is read of it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.find import locate
from compressor.checkpoint.hashed_reads import hash_of_bytes
from compressor.checkpoint.reader import READ_THREADS, Checkpoint, load_json
from compressor.checkpoint.source import Source
from compressor.errors import InputError, under
from compressor.ir.layout import Linear, weight_name
from compressor.ir.tensor import TensorShape
from compressor.numerics.bitdelta import SCALES, SIGNS

BASE_NAME = "base.json"


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """What a delta says of its base.

    identity    its name, and what pins it (a revision); no path
    model_type  its architecture
    tensors     name of each tensor in its files → SHA-256 of the stored bytes
    """

    identity: Mapping[str, str]
    model_type: str
    tensors: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all names and hashes."""
        lines = [f"{name} {digest}" for name, digest in sorted(self.tensors.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            **self.identity,
            "model_type": self.model_type,
            "fingerprint": self.fingerprint,
            "tensors": dict(self.tensors),
        }


def read_base_record(folder: Path) -> BaseRecord:
    """The record in a delta's folder. Raises InputError where it is missing or damaged."""
    data = load_json(folder / BASE_NAME, what="record of the base")
    tensors = data.pop("tensors", None)
    fingerprint = data.pop("fingerprint", None)
    model_type = data.pop("model_type", None)
    whole = isinstance(tensors, dict) and all(isinstance(v, str) for v in tensors.values())
    if not whole or not isinstance(model_type, str):
        raise InputError(f"{BASE_NAME} is damaged: it lists no tensors of a base")
    identity = {key: value for key, value in data.items() if isinstance(value, str)}
    record = BaseRecord(identity, model_type, tensors or {})
    if record.fingerprint != fingerprint:
        raise InputError(f"{BASE_NAME} is damaged: its fingerprint is not that of its hashes")
    return record


@dataclass(frozen=True, slots=True)
class Base:
    """A base that was found.

    record  its hashes, and `same` the names of the tensors that the fine-tune shares with it byte
            for byte, once both have been read; None and empty while only headers are known
    """

    source: Source
    identity: Mapping[str, str]
    record: BaseRecord | None = None
    same: frozenset[str] = frozenset()

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights of linears, named by module path: checkpoint name → [out, in], decoded."""
        return base_weights(self.source, names)


def locate_base(model: str, *, fetch: bool) -> Base:
    """Find a base as a recipe names it. Raises InputError for what is not there."""
    with under("base"):
        located = locate(model, fetch=fetch)
    return Base(source=located.source, identity=located.identity)


def survey(base: Base, fine: Checkpoint) -> Base:
    """Read both checkpoints once, a few tensors at a time, for the hashes and what is the same."""
    entries = base.source.checkpoint.entries

    def look(name: str) -> tuple[str, bool]:
        tensor = base.source.checkpoint.read([name])[name]
        other = fine.entries.get(name)
        same = other is not None and other.spec == entries[name].spec
        if same and other is not None:
            same = torch.equal(_bytes(tensor), _bytes(fine.read([name])[name]))
        return hash_of_bytes(tensor), same

    with ThreadPoolExecutor(READ_THREADS) as pool:
        seen = dict(zip(entries, pool.map(look, entries), strict=True))
    record = BaseRecord(
        identity=base.identity,
        model_type=base.source.layout.model_type,
        tensors={name: digest for name, (digest, _) in seen.items()},
    )
    same = frozenset(name for name, (_, equal) in seen.items() if equal)
    return replace(base, record=record, same=same)


def delta_shapes(linear: Linear, bits: int) -> dict[str, TensorShape]:
    """The tensors that hold a linear's delta, by full name."""
    words = -(-linear.in_features // 32)
    return {
        f"{linear.name}.{SIGNS}": TensorShape(torch.int32, (bits, words, linear.out_features)),
        f"{linear.name}.{SCALES}": TensorShape(torch.float32, (bits,)),
    }


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def base_weights(source: Source, names: Iterable[str]) -> dict[str, Tensor]:
    """Weights of linears of a checkpoint, quantized ones decoded: checkpoint name → [out, in]."""
    linears = {linear.name: linear for linear in source.layout.linears}
    return {
        weight_name(name): decoded(
            source, linears[name], source.checkpoint.read(stored_names(source, linears[name]))
        )
        for name in names
    }


def stored_names(source: Source, linear: Linear) -> list[str]:
    """Full names of the tensors that hold a linear's weight."""
    return [f"{linear.name}.{leaf}" for leaf in source.stored(linear)]


def decoded(source: Source, linear: Linear, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight [out, in] that those tensors stand for."""
    spec = source.schemes.linears[linear.name].weight
    if spec is None:
        return tensors[linear.weight_name]
    local = {leaf: tensors[f"{linear.name}.{leaf}"] for leaf in source.stored(linear)}
    return source.format.decode(local, spec).dequantize()
