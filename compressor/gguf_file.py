"""Reading GGUF, llama.cpp's format: metadata, and tensors that may be quantized in blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import InputError


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

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized to fp32."""
        import gguf

        stored = self.tensors[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=stored.nbytes, offset=stored.offset)
        if raw.size != stored.nbytes:
            raise InputError(f"{self.path.name} became shorter while it was read")
        rows = math.prod(stored.shape[:-1])
        try:
            values = gguf.dequantize(raw.reshape(rows, -1), stored.kind)
        except NotImplementedError as error:
            raise InputError(
                f"{name} is stored as {stored.kind.name}, which the package gguf cannot read"
            ) from error
        return torch.from_numpy(values.reshape(stored.shape))


def open_gguf(path: Path) -> GgufFile:
    """Read the header. Raises InputError for a file that is damaged, big-endian or one part of a
    split model, and where the package `gguf` is missing."""
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            "reading a GGUF file takes the package gguf", hint="pip install 'compressor[gguf]'"
        ) from error
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    # The reader checks as it goes, with whatever exception the damage leads to.
    try:
        reader = gguf.GGUFReader(path)
        little = reader.endianess == gguf.GGUFEndian.LITTLE
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: Stored(
                shape=tuple(reversed(tensor.shape.tolist())),
                kind=tensor.tensor_type,
                offset=int(tensor.data_offset),
                nbytes=int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
    except Exception as error:
        raise InputError(
            f"{path.name} is damaged or not a GGUF file: {str(error) or type(error).__name__}",
            hint="download the file again, and compare its size and hash with the source's",
        ) from error
    if not little:
        raise InputError(f"{path.name} is big-endian", hint="use the little-endian file")
    if metadata.get("split.count", 0) > 1:
        raise InputError(
            f"{path.name} is one of {metadata['split.count']} parts",
            hint="join the parts first: llama-gguf-split --merge",
        )
    return GgufFile(path=path, metadata=metadata, tensors=tensors)
