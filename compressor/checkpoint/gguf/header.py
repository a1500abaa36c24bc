"""The header of a GGUF file: metadata and where tensors lie.

Every count is held against the bytes that are there before anything is made of it. (The reader of
the package `gguf` walks whatever an array claims, and keeps two arrays for each of its entries.)

Layout: magic, version, tensor count and key count; keys with typed values; tensors with name,
dimensions, type and offset; padding; data. Source: ggml's docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}
"""Types of a value by their number in the file."""

MAX_ENTRIES = 4_000_000
"""Of all arrays together: a vocabulary of 256,000 tokens has a million and a half."""
MAX_DIMENSIONS = 8
ALIGNMENT = 32


class Damaged(ValueError):
    """The header contradicts itself or the file's size."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One tensor: dimensions as in the file (the fastest first), type, offset from the data."""

    dimensions: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says; `data` is where its tensors begin."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Listed]
    data: int


def parse(content: bytes | mmap.mmap) -> Header:
    """Read a header. Raises Damaged."""
    return _Cursor(content).header()


class _Cursor:
    """A place in the file that never leaves it."""

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self.content = content
        self.at = 0
        self.entries = 0

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            raise Damaged("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            swapped = struct.unpack("<I", struct.pack(">I", version))[0]
            why = "big-endian" if swapped in VERSIONS else f"of version {version}"
            raise Damaged(f"it is {why}; little-endian files of versions 2 and 3 are read")
        tensor_count, key_count = self.number("Q"), self.number("Q")
        self.room(24 * tensor_count + 12 * key_count)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.text()
            if key in metadata:
                raise Damaged(f"{key!r} stands there twice")
            metadata[key] = self.value(self.number("I"), depth=0)
        tensors: dict[str, Listed] = {}
        for _ in range(tensor_count):
            name = self.text()
            if name in tensors or not name.isprintable():
                raise Damaged(f"a tensor is called {name!r}, or two are")
            rank = self.number("I")
            if rank > MAX_DIMENSIONS:
                raise Damaged(f"{name} has {rank} dimensions")
            dimensions = tuple(self.number("Q") for _ in range(rank))
            if math.prod(dimensions) > 1 << 62:
                raise Damaged(f"{name} has the dimensions {list(dimensions)}")
            tensors[name] = Listed(dimensions, self.number("I"), self.number("Q"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise Damaged(f"general.alignment is {alignment!r}")
        return Header(metadata, tensors, -(-self.at // alignment) * alignment)

    def room(self, count: int) -> None:
        """Raises Damaged where fewer bytes are left."""
        if count > len(self.content) - self.at:
            raise Damaged(f"it claims {count} bytes at {self.at}, of {len(self.content)}")

    def take(self, count: int) -> bytes:
        self.room(count)
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, form: str) -> int:
        found: int = struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]
        return found

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Damaged("a text is not UTF-8") from error

    def value(self, kind: int, *, depth: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(depth=depth)
        return self.numbers(kind, 1)[0]

    def array(self, *, depth: int) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        self.entries += count
        if self.entries > MAX_ENTRIES or depth > 3:
            raise Damaged(f"its arrays claim {self.entries} entries; {MAX_ENTRIES} are the most")
        if kind in NUMBERS:
            return self.numbers(kind, count)
        return [self.value(kind, depth=depth + 1) for _ in range(count)]

    def numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in NUMBERS:
            raise Damaged(f"a value is of type {kind}")
        dtype = np.dtype(NUMBERS[kind]).newbyteorder("<")
        found: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype).tolist()
        return found
