"""Reading GGUF, llama.cpp's format: metadata, and tensors that may be quantized in blocks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.checkpoint.gguf.header import Listed, parse
from compressor.errors import InputError
from compressor.foreign.calls import foreign


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the file: its shape as in PyTorch, its GGML type and where its bytes lie."""

    shape: tuple[int, ...]
    kind: Any
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file whose header has been read; nothing of it stays mapped or open."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """One tensor, dequantized to fp32; with an index, that entry of its first dimension."""
        import gguf

        stored = self.tensors[name]
        shape, offset, nbytes = stored.shape, stored.offset, stored.nbytes
        if index is not None:
            nbytes //= shape[0]
            offset, shape = offset + index * nbytes, shape[1:]
        raw = np.fromfile(self.path, dtype=np.uint8, count=nbytes, offset=offset)
        if raw.size != nbytes:
            raise InputError(f"{self.path.name} became shorter while it was read")
        rows = math.prod(shape[:-1])
        with foreign(f"{name} is stored as {stored.kind.name}, which the package gguf cannot read"):
            values = gguf.dequantize(raw.reshape(rows, -1), stored.kind)
        return torch.from_numpy(values.reshape(shape))


def open_gguf(path: Path) -> GgufFile:
    """Read the header. Raises InputError for a file that is damaged, big-endian or one part of a
    split model, and where the package `gguf` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(
            "reading a GGUF file takes the package gguf", hint="pip install 'compressor[gguf]'"
        ) from error
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    size = path.stat().st_size
    try:
        with path.open("rb") as handle, mmap(handle.fileno(), 0, access=ACCESS_READ) as content:
            header = parse(content)
        tensors = {
            name: _stored(name, listed, header.data, size)
            for name, listed in header.tensors.items()
        }
    except ValueError as error:
        raise InputError(
            f"{path.name} is damaged or not a GGUF file: {error}",
            hint="download the file again, and compare its size and hash with the source's",
        ) from error
    metadata = header.metadata
    parts = metadata.get("split.count", 0)
    if type(parts) is not int or parts > 1:
        raise InputError(
            f"{path.name} is one of {metadata['split.count']} parts",
            hint="join the parts first: llama-gguf-split --merge",
        )
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _stored(name: str, listed: Listed, data: int, size: int) -> Stored:
    """Where a tensor lies. Raises ValueError for one that does not fit the file."""
    import gguf

    kind = gguf.GGMLQuantizationType(listed.kind)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    shape = tuple(reversed(listed.dimensions))
    if not shape or shape[-1] % block:
        raise ValueError(f"{name} of type {kind.name} has the shape {list(shape)}")
    nbytes *= math.prod(shape) // block
    offset = data + listed.offset
    if offset + nbytes > size:
        raise ValueError(f"{name} claims {nbytes} bytes at {offset}, of {size}")
    return Stored(shape=shape, kind=kind, offset=offset, nbytes=nbytes)
