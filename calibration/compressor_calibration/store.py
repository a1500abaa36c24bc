"""Rows of activations on disk: as many as the disk holds, while memory holds a few.

Reading runs a batch ahead and writing a batch behind, each in a thread of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WAITING = 2
"""Batches that wait to be written before the writer makes its caller wait."""


@dataclass(frozen=True, slots=True)
class ActivationStore:
    """A file of `rows` rows [length, width] of one dtype, each at its place."""

    path: Path
    rows: int
    length: int
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.length * self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.rows * self.row_bytes

    def create(self) -> None:
        """Make the file, with its whole size taken from the disk where the system can do that."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                os.posix_fallocate(handle, 0, max(1, self.nbytes))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(handle, self.nbytes)
        finally:
            os.close(handle)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Some rows, [len(rows), length, width] on the CPU."""
        out = bytearray(len(rows) * self.row_bytes)
        view = memoryview(out)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            for number, row in enumerate(rows):
                part = view[number * self.row_bytes : (number + 1) * self.row_bytes]
                done = 0
                while done < self.row_bytes:
                    got = os.preadv(handle, [part[done:]], row * self.row_bytes + done)
                    if not got:
                        raise OSError(f"{self.path} ends before row {row}")
                    done += got
        finally:
            os.close(handle)
        flat = torch.frombuffer(out, dtype=self.dtype)
        return flat.view(len(rows), self.length, self.width)

    def content_hash(self) -> str:
        """SHA-256 over the SHA-256 of each row, in order; all of the file is read."""
        whole = hashlib.sha256()
        for row in range(self.rows):
            data = self.read([row]).view(torch.uint8).numpy().reshape(-1)
            whole.update(hashlib.sha256(memoryview(data)).digest())
        return whole.hexdigest()

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """A writer; what it was given is on the disk when the `with` ends."""
        handle = os.open(self.path, os.O_RDWR)
        try:
            with ThreadPoolExecutor(1) as pool:
                writer = Writer(self, handle, pool)
                yield writer
                writer.drain()
            os.fsync(handle)
        finally:
            os.close(handle)


class Writer:
    """Puts rows at their places, in the background."""

    def __init__(self, store: ActivationStore, handle: int, pool: ThreadPoolExecutor) -> None:
        self.store = store
        self._handle = handle
        self._pool = pool
        self._waiting: deque[Future[None]] = deque()
        self._hashes: dict[int, bytes] = {}

    def content_hash(self) -> str:
        """The store's hash, from what was given; every row was, and the `with` has ended."""
        rows = (self._hashes[row] for row in range(self.store.rows))
        return hashlib.sha256(b"".join(rows)).hexdigest()

    def put(self, first: int, rows: Tensor) -> None:
        """Write rows [n, length, width] from place `first` on. Raises OSError of an earlier one."""
        while len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        ready = rows.detach().to("cpu", self.store.dtype, copy=True).contiguous()
        self._waiting.append(self._pool.submit(self._write, first, ready))

    def drain(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _write(self, first: int, rows: Tensor) -> None:
        data = memoryview(rows.view(torch.uint8).numpy().reshape(-1))
        size = self.store.row_bytes
        for number in range(rows.shape[0]):
            row = data[number * size : (number + 1) * size]
            self._hashes[first + number] = hashlib.sha256(row).digest()
        place = first * size
        done = 0
        while done < len(data):
            done += os.pwrite(self._handle, data[done:], place + done)


def read_ahead(
    stores: Sequence[ActivationStore], batches: Iterable[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
    """Batches of row numbers with those rows of each store; one batch is read ahead."""

    def load(rows: Sequence[int]) -> list[Tensor]:
        return [store.read(rows) for store in stores]

    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[Sequence[int], Future[list[Tensor]]] | None = None
        for rows in batches:
            coming = (rows, pool.submit(load, rows))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()
