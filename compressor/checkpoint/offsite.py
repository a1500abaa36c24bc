"""Offsite-Tuning's record (arXiv 2302.04870): which blocks of a full model an emulator or an
adapter holds, and by what the full model is known again.

An adapter is the first and the last blocks of a model, which are tuned; all else stays. A model is
known by the bytes of what stays, so it is the same before and after its adapter was tuned.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from compressor.checkpoint.reader import READ_THREADS, Checkpoint, load_json
from compressor.checkpoint.safetensors import tensor_bytes
from compressor.checkpoint.slices import unsliced
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.frozen import Strict, messages

OFFSITE_NAME = "offsite.json"

Progress = Callable[[str, int, int], None]


class OffsiteRecord(Strict):
    """What lies beside an emulator or an adapter.

    base         what the full model is called;  model_type  its architecture
    blocks       how many it has;  pads  how many of the first and of the last are the adapter
    kept         the full model's block that each block here is
    fingerprint  SHA-256 over the names and bytes of all that is outside the adapter
    middle       where the weights between the pads come from: the full model's own, distilled from
                 it, or given
    """

    version: Literal[1] = 1
    base: str
    model_type: str
    blocks: int
    pads: tuple[int, int]
    kept: tuple[int, ...]
    fingerprint: str
    middle: Literal["kept", "distilled", "given"] = "kept"

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        check_pads(self.blocks, self.pads)
        own = self.adapter_blocks
        ascending = list(self.kept) == sorted(set(self.kept))
        if not ascending or not set(own) <= set(self.kept) <= set(range(self.blocks)):
            raise ValueError(f"kept does not hold the blocks {own} of {self.blocks}")
        return self

    @property
    def adapter_blocks(self) -> tuple[int, ...]:
        """Numbers of the adapter's blocks in the full model."""
        return adapter_blocks(self.blocks, self.pads)

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers, here, of blocks whose weights are not the full model's."""
        if self.middle == "kept":
            return ()
        return tuple(range(self.pads[0], len(self.kept) - self.pads[1]))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return self.model_dump(mode="json")


def read_offsite_record(folder: Path) -> OffsiteRecord | None:
    """A folder's record, or None where it has none. Raises InputError for a damaged one."""
    if not (folder / OFFSITE_NAME).is_file():
        return None
    try:
        data = load_json(folder / OFFSITE_NAME, what="record of the full model")
        return OffsiteRecord.model_validate(data)
    except ValidationError as error:
        raise InputError(
            f"{folder / OFFSITE_NAME} is damaged: {messages(error)[0]}",
            hint="take it from the emulator or the adapter once more",
        ) from error


def check_pads(blocks: int, pads: tuple[int, int]) -> None:
    """Raises ValueError for pads that are no adapter of a model with so many blocks."""
    bottom, top = pads
    if bottom < 0 or top < 0 or bottom + top < 1:
        raise ValueError(f"pads of {bottom} and {top} blocks are no adapter")
    if bottom + top >= blocks:
        raise ValueError(f"pads of {bottom} and {top} blocks leave no middle of {blocks} blocks")


def adapter_blocks(blocks: int, pads: tuple[int, int]) -> tuple[int, ...]:
    """Numbers of the first and the last blocks."""
    return (*range(pads[0]), *range(blocks - pads[1], blocks))


def stored(source: Source) -> Checkpoint:
    """A source's tensors as files have them: a stack of experts is one."""
    return unsliced(source.checkpoint)


def adapter_names(source: Source, pads: tuple[int, int]) -> list[str]:
    """Names of a full model's tensors that are its adapter."""
    blocks = source.layout.blocks
    inside = tuple(f"{blocks[i].name}." for i in adapter_blocks(len(blocks), pads))
    return [name for name in stored(source).entries if name.startswith(inside)]


def fingerprint(
    source: Source, pads: tuple[int, int], *, progress: Progress = lambda name, done, total: None
) -> str:
    """What a full model is known by; everything outside the adapter is read once."""
    checkpoint, own = stored(source), set(adapter_names(source, pads))
    names = sorted(checkpoint.entries.keys() - own)

    def lines() -> Iterator[str]:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            found = pool.map(lambda name: _digest(checkpoint, name), names)
            for done, (name, digest) in enumerate(zip(names, found, strict=True), 1):
                progress("fingerprint", done, len(names))
                yield f"{name} {digest}"

    whole = [source.layout.model_type, str(len(source.layout.blocks)), *lines()]
    return hashlib.sha256("\n".join(whole).encode()).hexdigest()


def _digest(checkpoint: Checkpoint, name: str) -> str:
    tensor = checkpoint.read([name])[name]
    shown = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    shown.update(tensor_bytes(tensor))
    return shown.hexdigest()
