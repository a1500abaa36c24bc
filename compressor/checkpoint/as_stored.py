"""A checkpoint written with the same files as another: the same names and headers to the byte, so
that what is not changed gives files of the same hash.

Nothing is known of the architecture here: tensors go by the names that the files have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.checkpoint.container import Container, Shard, ShardLayout
from compressor.checkpoint.reader import INDEX_NAME, load_json
from compressor.checkpoint.safetensors import Entry
from compressor.ir.layout import UnitLayout
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit
from compressor.ranks.ranks import ALONE, Ranks

PART = 1 << 30
"""Bytes of tensors that are in memory at a time, at least one tensor."""


class AsTheyAre:
    """Of a target, what there is to say of tensors that are written as they come."""

    def encode(self, unit: Unit) -> dict[str, Tensor]:
        """As they are."""
        return {name: unit.tensors[name] for name in unit.layout.tensors}

    def decode(
        self, unit: UnitLayout, tensors: Mapping[str, Tensor], *, ranks: Ranks = ALONE
    ) -> Unit:
        """As they are."""
        return Unit(layout=unit, tensors=tensors)


@dataclass(frozen=True)
class SameFiles:
    """The files of a folder, laid out as they are."""

    folder: Path
    entries: Mapping[str, Entry]

    def lay_out(self, groups: Sequence[Mapping[str, TensorShape]]) -> ShardLayout:
        """Each tensor where it is in the folder's files."""
        files: dict[str, dict[str, Entry]] = {}
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].begin):
            files.setdefault(entry.file.name, {})[name] = entry
        shards = tuple(_shard(self.folder / file, files[file]) for file in sorted(files))
        index = self.folder / INDEX_NAME
        return ShardLayout(shards, {INDEX_NAME: index.read_bytes()} if index.is_file() else {})


def _shard(path: Path, entries: Mapping[str, Entry]) -> Shard:
    with path.open("rb") as handle:
        header = handle.read(min(entry.begin for entry in entries.values()))
    return Shard(
        file=path.name,
        tensors={name: entry.spec for name, entry in entries.items()},
        offsets={name: entry.begin for name, entry in entries.items()},
        fixed={0: header},
    )


@dataclass(frozen=True)
class StoredTarget(AsTheyAre):
    """A folder's checkpoint, or a part of it, as it is stored; a unit is some of its tensors.

    files_as  how its files are laid out: as they are, if None
    """

    folder: Path
    entries: Mapping[str, Entry]
    files_as: Container | None = None

    @property
    def units(self) -> Sequence[UnitLayout]:
        """Its tensors in the order of its files, a part of them at a time."""
        parts: list[list[str]] = []
        size = PART
        order = sorted(self.entries.items(), key=lambda item: (item[1].file.name, item[1].begin))
        for name, entry in order:
            if size + entry.spec.nbytes > PART:
                parts.append([])
                size = 0
            parts[-1].append(name)
            size += entry.spec.nbytes
        return [
            UnitLayout(name=f"part {i + 1}", kind="block", index=i, tensors=tuple(names))
            for i, names in enumerate(parts)
        ]

    @property
    def container(self) -> Container:
        """The same files, or others."""
        return self.files_as or SameFiles(self.folder, self.entries)

    def shapes(self, unit: UnitLayout) -> dict[str, TensorShape]:
        """As they are."""
        return {name: self.entries[name].spec for name in unit.tensors}

    def config(self) -> dict[str, Any]:
        """The folder's."""
        return load_json(self.folder / "config.json", what="config")

    def files(self) -> dict[str, Any]:
        """None of its own."""
        return {}
