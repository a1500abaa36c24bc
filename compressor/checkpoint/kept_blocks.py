"""A model with some of another's blocks, renumbered, that exists only when it is read.

It is a source like any other, so whatever reads, calibrates, quantizes, evaluates and writes models
works on it and knows nothing of the blocks that are left out.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compressor.arch.schema import MapFile
from compressor.checkpoint.reader import READ_THREADS, Checkpoint
from compressor.checkpoint.slices import unsliced
from compressor.checkpoint.source import Source, as_source
from compressor.checkpoint.wrapper import Wrapper, wrapped
from compressor.errors import InputError
from compressor.ir.layout import UnitLayout


@dataclass(frozen=True)
class KeptCheckpoint(Wrapper):
    """Some blocks of another checkpoint, and all that is in none.

    original  where tensors come from;  names  name here → name there
    """

    original: Checkpoint
    names: Mapping[str, str]

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = READ_THREADS
    ) -> dict[str, Tensor]:
        """The named tensors on the CPU. Raises InputError for a name that is not there."""
        theirs = {name: self.names.get(name, name) for name in names}
        found = self.original.read(theirs.values(), pin=pin, threads=threads)
        return {name: found[other] for name, other in theirs.items()}


def kept_source(source: Source, kept: Sequence[int], config: Mapping[str, Any]) -> Source:
    """The source whose block i is block kept[i] (ascending) of another.

    config  its config.json
    Raises InputError where a kept block is not the same at its new place.
    """
    if source.arch.free:
        raise InputError(
            "blocks are left out of models with an architecture map alone",
            hint="compress map draft MODEL writes a first one",
        )
    if source.quantized:
        raise InputError(
            f"{source.checkpoint.folder} holds {source.low_precision}, not floats",
            hint="start from the original weights; what is kept can be quantized after that",
        )
    stored = unsliced(source.checkpoint)
    moved = renumbering(source.arch, kept, count=len(source.layout.blocks))
    names = {ours: name for name in stored.entries if (ours := moved(name)) is not None}
    said = (
        f"{len(kept)} of {len(source.layout.blocks)} blocks are kept: {', '.join(map(str, kept))}"
    )
    kept_alone = wrapped(
        KeptCheckpoint,
        stored,
        config=config,
        entries={name: stored.entries[other] for name, other in names.items()},
        notes=(*stored.notes, said),
        original=stored,
        names=names,
    )
    found = as_source(kept_alone, arch=source.arch)
    for number, block in enumerate(kept):
        before, after = source.layout.blocks[block], found.layout.blocks[number]
        if _kind(before) != _kind(after):
            raise InputError(
                f"{before.name} would be another kind of block as {after.name}",
                hint="keep other blocks (keep: [...])",
            )
    return found


def whole_source(source: Source) -> Source:
    """The source that `kept_source` took blocks of."""
    stored = unsliced(source.checkpoint)
    assert isinstance(stored, KeptCheckpoint), f"{stored.folder} has all of its blocks"
    return as_source(stored.original, arch=source.arch)


def renumbering(arch: MapFile, kept: Sequence[int], *, count: int) -> Callable[[str], str | None]:
    """A function from a tensor's name to the one that it has where only `kept` blocks are, or None
    where it has none. What is numbered beyond the blocks (heads for several tokens) stays so."""
    place = {block: number for number, block in enumerate(kept)}

    def renamed(name: str) -> str | None:
        block, local = block_of(arch, name)
        if block is None:
            return name
        number = place.get(block) if block < count else len(kept) + block - count
        return None if number is None else f"{arch.layer.format(i=number)}.{local}"

    return renamed


def block_of(arch: MapFile, name: str) -> tuple[int | None, str]:
    """The number of the block that a tensor's name is of, or None, and the name inside it."""
    before, _, after = arch.layer.partition("{i}")
    found = re.fullmatch(rf"{re.escape(before)}(\d+){re.escape(after)}\.(.*)", name)
    return (None, name) if found is None else (int(found[1]), found[2])


def _kind(unit: UnitLayout) -> Any:
    """All that a layout says of a block, less its number."""
    return (
        [name.removeprefix(unit.name) for name in unit.tensors],
        [(x.name.removeprefix(unit.name), x.role, x.shape) for x in unit.linears],
        [(mixer.kind, mixer.shape) for mixer in unit.mixers],
    )
