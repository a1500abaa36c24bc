"""Files of strangers are looked at before they are read: what they are, and how large.

A pipe or a device in the place of a file would be waited for or read without end, and JSON takes
twenty times its size in memory once it is parsed.
"""

import json
import os
import select
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.errors import InputError

MAX_BYTES = 128 << 20
"""Of a text file that is read whole: an index of a hundred thousand tensors takes ten."""

MAX_VALUES = 4_000_000
"""Of JSON: objects, lists and what they hold, counted before they are made."""

WAIT_SECONDS = 10.0


def read_file(path: Path, *, what: str, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file. Raises InputError for anything else, and for more than `most`
    bytes."""
    try:
        # Opening a pipe waits for a writer unless it is told not to.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as handle:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{what} {path} is not a regular file")
            return _bounded(handle.read(most + 1), path, what=what, most=most)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {what} {path}: {said}") from error


def read_stream(path: Path, *, what: str, most: int) -> bytes:
    """The content of a file, or of a pipe whose writer ends within some seconds: `<(…)` of a shell,
    /dev/stdin. Raises InputError otherwise."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISFIFO(mode):
            return read_file(path, what=what, most=most)
        found = b""
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as handle:
            while len(found) <= most:
                if not select.select([handle], [], [], WAIT_SECONDS)[0]:
                    raise InputError(f"{what} {path} is a pipe that nothing comes from")
                piece = handle.read(1 << 16)
                if not piece:
                    break
                found += piece
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror or error}") from error
    return _bounded(found, path, what=what, most=most)


def parse_json(data: bytes, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON of bounded size. Raises ValueError.

    pairs  makes the objects, as `object_pairs_hook` of `json.loads`
    """
    if sum(data.count(mark) for mark in (b"{", b"[", b",")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        return json.loads(data, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _bounded(data: bytes, path: Path, *, what: str, most: int) -> bytes:
    if len(data) > most:
        raise InputError(f"{what} {path} is larger than {most / 1e6:.0f} MB")
    return data
