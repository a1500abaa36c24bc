"""Containers: files that hold named tensors, as values whose every byte position is known before
the first tensor is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compressor.checkpoint.reader import STEM, index_name
from compressor.checkpoint.safetensors import encode_header
from compressor.errors import InputError
from compressor.ir.tensor import TensorShape


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file.

    tensors  name → dtype and shape, in order;  offsets  name → where its bytes begin
    fixed    position → bytes that are no tensor's: a header, padding, an index at the end
    """

    file: str
    tensors: Mapping[str, TensorShape]
    offsets: Mapping[str, int]
    fixed: Mapping[int, bytes]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        ends = [self.offsets[name] + spec.nbytes for name, spec in self.tensors.items()]
        return max(ends + [at + len(data) for at, data in self.fixed.items()], default=0)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """All output files of a container; `index` are those that hold no tensor, name → content."""

    shards: tuple[Shard, ...]
    index: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def home(self) -> dict[str, Shard]:
        """Tensor name → its shard."""
        return {name: shard for shard in self.shards for name in shard.tensors}

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


class Container(Protocol):
    """A kind of file; what it needs to know beside names and shapes are its fields."""

    def lay_out(self, groups: Sequence[Mapping[str, TensorShape]]) -> ShardLayout:
        """Files of these tensors in order, those of a group in one file. Raises InputError where
        they cannot be held."""


def lay_out(container: Container, units: Iterable[Mapping[str, TensorShape]]) -> ShardLayout:
    """The files of these units' tensors; those of one module lie in one file. Raises InputError."""
    groups: list[dict[str, TensorShape]] = []
    for shapes in units:
        modules: dict[str, dict[str, TensorShape]] = {}
        for name, spec in shapes.items():
            modules.setdefault(name.rpartition(".")[0], {})[name] = spec
        groups += modules.values()
    return container.lay_out(groups)


@dataclass(frozen=True, slots=True)
class Safetensors:
    """Shards of at most `max_bytes` of tensors, and their index, which is always written; `stem` is
    what their names begin with."""

    max_bytes: int = 5 * 10**9
    stem: str = STEM

    def lay_out(self, groups: Sequence[Mapping[str, TensorShape]]) -> ShardLayout:
        """Fill shards with `groups`. Raises InputError where one group alone is larger."""
        filled: list[dict[str, TensorShape]] = [{}]
        used = 0
        for group in groups:
            size = sum(spec.nbytes for spec in group.values())
            if size > self.max_bytes:
                raise InputError(
                    f"{next(iter(group))} and its siblings take {size} bytes, more than one shard",
                    hint=f"raise max_shard_size to at least {size}",
                )
            if used and used + size > self.max_bytes:
                filled.append({})
                used = 0
            filled[-1].update(group)
            used += size
        shards = []
        for number, tensors in enumerate(filled, 1):
            header, offsets = encode_header(tensors)
            several = f"{self.stem}-{number:05d}-of-{len(filled):05d}.safetensors"
            name = several if len(filled) > 1 else f"{self.stem}.safetensors"
            shards.append(Shard(file=name, tensors=tensors, offsets=offsets, fixed={0: header}))
        weight_map = {name: shard.file for shard in shards for name in shard.tensors}
        total = sum(spec.nbytes for tensors in filled for spec in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        content = (json.dumps(index, indent=2) + "\n").encode()
        return ShardLayout(shards=tuple(shards), index={index_name(self.stem): content})
