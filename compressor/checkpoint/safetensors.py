"""Reading and laying out safetensors files byte by byte.

Files are untrusted: a header is checked completely before any memory is allocated for tensors.
Data is read with positioned reads instead of a memory map, so nothing stays mapped and a unit's
bytes are the only ones in memory.

Format: 8 bytes little-endian header length, JSON header, tensor data without gaps.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.lfs import is_pointer, pointer_error
from compressor.errors import InputError
from compressor.foreign.untrusted import parse_json
from compressor.ir.tensor import TensorShape

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: [begin, end) counts from the start of the file."""

    file: Path
    spec: TensorShape
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of one file, after checking the header against the file's size.

    Raises InputError for a file that is damaged or not safetensors.
    """
    damaged = partial(_damaged, path)
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            prefix = handle.read(8)
            if is_pointer(path):
                raise pointer_error(path.name)
            if len(prefix) < 8:
                raise damaged(f"{size} bytes are too few for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise damaged(f"its header claims {length} bytes, the file has {size}")
            raw = handle.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> dict[str, Entry]:
    """The entries of a header whose JSON is `raw`, for a file of `size` bytes."""

    damaged = partial(_damaged, path)
    try:
        header = parse_json(raw, pairs=_no_duplicates)
    except ValueError as error:
        raise damaged(f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise damaged("__metadata__ is not an object")
    start = 8 + len(raw)
    entries: dict[str, Entry] = {}
    for name, item in header.items():
        if not name.isprintable():
            raise damaged(f"a tensor is called {name!r}")
        try:
            kind, shape = item["dtype"], item["shape"]
            begin, end = item["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(f"the entry of {name} is incomplete") from error
        if not isinstance(kind, str):
            raise damaged(f"the dtype of {name} is no name")
        if kind not in DTYPES:
            raise InputError(
                f"{path.name} holds {name} as {kind[:20]}, which is not read",
                hint=f"dtypes that are: {', '.join(DTYPES)}",
            )
        dtype = DTYPES[kind]
        numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
        if any(type(n) is not int or n < 0 or n > 1 << 62 for n in numbers):
            raise damaged(f"the shape or offsets of {name} are not counts")
        spec = TensorShape(dtype=dtype, shape=tuple(shape))
        if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
            raise damaged(f"{name} claims bytes {begin} to {end}, which do not fit")
        entries[name] = Entry(file=path, spec=spec, begin=start + begin, end=start + end)
    reached = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            raise damaged(f"the data of {name} overlaps or leaves a gap")
        reached = entry.end
    if reached != size:
        raise damaged(f"{size - reached} bytes follow the last tensor (or are missing)")
    return entries


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"{path.name} is damaged: {why}",
        hint="download the file again, and compare its size and hash with the source's",
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key appears twice")
    return dict(pairs)


PIECE = 2**26
"""Bytes that are read and looked at by one call each. Between calls other threads take Python, and
the one that starts a GPU's kernels waits for it."""


def read_tensor(
    entry: Entry, *, pin: bool = False, look: Callable[[memoryview], object] | None = None
) -> Tensor:
    """One tensor's data, on the CPU (in page-locked memory with `pin`).

    look  is shown its bytes in order, piece by piece
    """
    buffer = _read(entry.file, entry.begin, entry.end, pin=pin, look=look)
    return buffer.view(entry.spec.dtype).reshape(entry.spec.shape)


def read_run(entries: Sequence[Entry], *, pin: bool = False) -> list[Tensor]:
    """The data of tensors that follow one another in a file, in one piece of memory."""
    first = entries[0]
    buffer = _read(first.file, first.begin, entries[-1].end, pin=pin)
    return [
        buffer[x.begin - first.begin : x.end - first.begin].view(x.spec.dtype).reshape(x.spec.shape)
        for x in entries
    ]


def _read(
    file: Path,
    begin: int,
    end: int,
    *,
    pin: bool,
    look: Callable[[memoryview], object] | None = None,
) -> Tensor:
    """Bytes of a file, uint8."""
    buffer = torch.empty(end - begin, dtype=torch.uint8, pin_memory=pin)
    view = memoryview(buffer.numpy())
    done = 0
    with file.open("rb", buffering=0) as handle:
        while done < len(view):
            wanted = view[done:] if look is None else view[done : done + PIECE]
            count = os.preadv(handle.fileno(), [wanted], begin + done)
            if count == 0:
                raise InputError(f"{file.name} became shorter while it was read")
            if look is not None:
                look(wanted[:count])
            done += count
    return buffer


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes as they are stored, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def encode_header(tensors: Mapping[str, TensorShape]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds `tensors` in this order, and each tensor's offset
    from the start of the file. Tensors are laid end to end; the header is padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    relative: dict[str, int] = {}
    for name, spec in tensors.items():
        relative[name] = offset
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % 8)
    start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {n: start + o for n, o in relative.items()}
