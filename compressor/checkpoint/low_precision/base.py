"""A checkpoint of low-precision tensors seen as one of floats, which exist only when they are read.

Unlike a format, a layout here need not be expressible as codes with scales in order: it only has to
say what each weight is. No float copy is ever on disk.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.checkpoint.reader import READ_THREADS, Checkpoint
from compressor.checkpoint.safetensors import Entry, read_tensor
from compressor.checkpoint.wrapper import Wrapper, wrapped
from compressor.errors import InputError, several, under
from compressor.ir.layout import is_weight
from compressor.ir.tensor import TensorShape

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Stored:
    """One weight in parts.

    parts   local name → name in the files
    decode  parts by local name → the weight in float32
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


class Layout(Protocol):
    """One way to store weights in low precision."""

    inert: tuple[str, ...]
    """Leaves beside a weight that say nothing of its values, such as scales of inputs."""

    def claims(self, declared: Mapping[str, Any] | None, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint with this `quantization_config` is stored so."""

    def describe(self, declared: Mapping[str, Any] | None) -> str:
        """The layout in a few words; empty where its values are the model's own."""

    def stored(
        self, declared: Mapping[str, Any] | None, checkpoint: Checkpoint
    ) -> dict[str, Stored]:
        """Every weight that is stored so, by its name. Raises InputError for what is amiss."""


@dataclass(frozen=True, slots=True)
class DecodedCheckpoint(Wrapper):
    """Floats in the model's dtype; what is stored in parts is rounded to it once, from float32.

    stored  the weights in parts, by name;  files  the header entries of the parts
    """

    stored: Mapping[str, Stored]
    files: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        plain = [entry for name, entry in self.entries.items() if name not in self.stored]
        return sum(entry.spec.nbytes for entry in (*plain, *self.files.values()))

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = READ_THREADS
    ) -> dict[str, Tensor]:
        """The named tensors on the CPU. Raises InputError for a name that is not there, and for
        parts that do not fit together."""
        entries = {name: self.entry(name) for name in names}
        with ThreadPoolExecutor(threads) as pool:
            read = pool.map(lambda item: self._read(*item, pin=pin), entries.items())
            return dict(zip(entries, read, strict=True))

    def _read(self, name: str, entry: Entry, *, pin: bool) -> Tensor:
        found = self.stored.get(name)
        if found is None:
            return read_tensor(entry, pin=pin)
        with under(name):
            value = found.decode({k: read_tensor(self.files[p]) for k, p in found.parts.items()})
        value = value.to(entry.spec.dtype)
        return value.pin_memory() if pin else value


def decoded(
    checkpoint: Checkpoint, layout: Layout, declared: Mapping[str, Any] | None, dtype: torch.dtype
) -> DecodedCheckpoint:
    """The checkpoint as floats in `dtype`. Raises InputError for a tensor that is left over."""
    stored = layout.stored(declared, checkpoint)
    parts = {part for item in stored.values() for part in item.parts.values()}
    rest = {name: entry for name, entry in checkpoint.entries.items() if name not in parts}
    paths = {name.rpartition(".")[0] for name in stored}
    modules = {name.rpartition(".")[0] for name in rest if is_weight(name)}
    inert = [n for n in rest if _leaf(n) in layout.inert and n.rpartition(".")[0] not in modules]
    for name in inert:
        del rest[name]
    for name, entry in rest.items():
        beside = name.rpartition(".")[0] in paths and _leaf(name) not in ("weight", "bias")
        if beside or entry.spec.dtype not in FLOATS:
            kind = str(entry.spec.dtype).removeprefix("torch.")
            raise InputError(
                f"{name} ({kind}) is left over: what it does to the weights is not known here",
                hint="start from the original weights, or dequantize it with the tool it is from",
            )
    first = {n: checkpoint.entries[next(iter(x.parts.values()))] for n, x in stored.items()}
    entries = {n: replace(first[n], spec=TensorShape(dtype, x.shape)) for n, x in stored.items()}
    said = layout.describe(declared)
    kind = str(dtype).removeprefix("torch.")
    notes = [f"{len(stored)} weights are stored as {said or 'float8'} and read as {kind}"]
    if inert:
        notes.append(f"left out: {several(inert)} (scales of inputs or caches)")
    return wrapped(
        DecodedCheckpoint,
        checkpoint,
        config={k: v for k, v in checkpoint.config.items() if k != "quantization_config"},
        entries={**rest, **entries},
        notes=(*checkpoint.notes, *notes),
        stored_as=said,
        stored=stored,
        files={part: checkpoint.entries[part] for part in parts},
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
