"""Writing a checkpoint whose every byte position is known before the first unit is done.

The plan knows each output tensor's dtype and shape, so what a container has beside tensors is
written first and each unit lands at its final place with positioned writes. A unit counts only
while its record exists and its bytes are those that the record tells of; others are simply written
again. Nothing unfinished looks finished: shards stay in the work folder to the end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from compressor.checkpoint.container import Shard, ShardLayout
from compressor.checkpoint.durable import is_file, make_way, move, own_folder
from compressor.checkpoint.records import Records
from compressor.checkpoint.safetensors import Entry, read_tensor, tensor_bytes
from compressor.ir.tensor import TensorShape
from compressor.ranks.ranks import Ranks

HASH_THREADS = 2
"""Threads that hash tensors while their file is written."""
RUN = 2**26
"""Bytes that are hashed and written at a time."""
PIECE = 2**22
"""Bytes that are read back and hashed at a time."""
VECTORS = 512
"""Tensors that are written in one call; systems take 1,024."""


class ShardWriter:
    """Writes units into the shards of a work folder and keeps their records.

    Records live in `folder/units`, shards in `folder/shards`.
    owner  what decides the bytes of every unit: records of another are not seen
    alone  no other process commits units: files are hashed with them
    """

    def __init__(
        self, layout: ShardLayout, folder: Path, *, owner: str, alone: bool = True
    ) -> None:
        self.layout = layout
        self.alone = alone
        self.shards = folder / "shards"
        self.records = Records(folder / "units", owner)
        self._home = layout.home
        self._hashes: dict[str, _RunningHash] = {}
        self._whole: dict[str, str] = {}
        self._committed: dict[int, dict[str, Any]] = {}

    def open(self, checking: Callable[[], None] = lambda: None) -> list[str]:
        """Create the folders and every shard that is not there yet, at its full size, and hold each
        unit that an interrupted run committed against its bytes.

        checking  called before each committed unit is read
        Returns the records that are damaged or whose bytes are; their units are to be done again.
        """
        own_folder(self.shards)
        own_folder(self.records.folder)
        for shard in self.layout.shards:
            self._lay_out(shard)
        damaged = []
        for path in sorted(self.records.folder.glob("[0-9]*.json")):
            checking()
            record = self.records.get(path.name)
            if record is not None and self._intact(record["tensors"]):
                self._committed[int(path.stem)] = record
            else:
                damaged.append(path.name)
                self.records.drop(path.name)
        return damaged

    def _lay_out(self, shard: Shard) -> None:
        """Give a shard its size, and what is no tensor's."""
        path = self.shards / shard.file
        if is_file(path):
            with path.open("r+b") as handle:
                _fix(handle, shard)
            return
        make_way(path)
        temporary = path.with_suffix(".new")
        with temporary.open("w+b") as handle:
            _fix(handle, shard)
        move(temporary, path)

    def _intact(self, hashes: Mapping[str, str]) -> bool:
        """Whether the files hold the tensors that a record tells of."""
        names = sorted(hashes, key=lambda name: (self._home[name].file, self._offset(name)))
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            data = [tensor_bytes(tensor) for tensor in self.read(names).values()]
            found = dict(zip(names, pool.map(_digest, data), strict=True))
        if found != hashes:
            return False
        self._hash_with(names)
        return True

    def _offset(self, name: str) -> int:
        return self._home[name].offsets[name]

    def record(self, index: int) -> dict[str, Any] | None:
        """What `commit` recorded of a unit, or None where it is not committed."""
        return self._committed.get(index)

    def tensor_hashes(self) -> dict[str, str]:
        """SHA-256 of every tensor; all units are committed."""
        found: dict[str, str] = {}
        for _, record in sorted(self._committed.items()):
            found |= record["tensors"]
        assert set(found) == set(self._home), f"not committed: {set(self._home) ^ set(found)}"
        return found

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises AssertionError where a tensor is not what the plan said: that is a bug, never a
        user's error."""
        for name, tensor in tensors.items():
            planned = self._home[name].tensors[name]
            found = TensorShape(dtype=tensor.dtype, shape=tuple(tensor.shape))
            assert planned == found, f"{name}: planned {planned}, made {found}"

    def write(self, data: Mapping[str, memoryview]) -> dict[str, str]:
        """Put the bytes of tensors at their places; name → their SHA-256. They are not committed
        yet."""
        digests: dict[str, str] = {}
        hashed: list[Future[dict[str, str]]] = []
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            for run in self._runs(data):
                file, offset = self._home[run[0]].file, self._offset(run[0])
                parts = {n: data[n] for n in run}
                for first in range(HASH_THREADS):
                    share = {n: parts[n] for n in run[first::HASH_THREADS]}
                    hashed.append(pool.submit(_digests, share))
                with (self.shards / file).open("r+b", buffering=0) as handle:
                    _write_at(handle.fileno(), list(parts.values()), offset)
            for some in hashed:
                digests |= some.result()
        return {name: digests[name] for name in data}

    def _runs(self, data: Mapping[str, memoryview]) -> Iterator[list[str]]:
        """Names of tensors that follow each other in a file, `RUN` bytes or one tensor at most."""
        run: list[str] = []
        place, end, size = "", 0, 0
        for name in sorted(data, key=lambda name: (self._home[name].file, self._offset(name))):
            file, offset, nbytes = self._home[name].file, self._offset(name), data[name].nbytes
            if run and ((file, offset) != (place, end) or size + nbytes > RUN):
                yield run
                run, size = [], 0
            run.append(name)
            place, end, size = file, offset + nbytes, size + nbytes
        if run:
            yield run

    def commit(self, index: int, hashes: Mapping[str, str], record: Mapping[str, Any]) -> None:
        """Sync what was written of a unit, here or by others on this host, and put its record in
        place.

        The record gets each tensor's SHA-256 under "tensors".
        """
        with ThreadPoolExecutor(1) as pool:
            hashed = pool.submit(self._hash_with, hashes)
            for file in sorted({self._home[name].file for name in hashes}):
                with (self.shards / file).open("rb") as handle:
                    os.fsync(handle.fileno())
            hashed.result()
        whole = {**record, "tensors": dict(hashes)}
        self.records.put(f"{index:05d}.json", whole)
        self._committed[index] = whole

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Committed tensors, read back."""
        found = {}
        for name in names:
            shard = self._home[name]
            spec, begin = shard.tensors[name], shard.offsets[name]
            entry = Entry(self.shards / shard.file, spec, begin, begin + spec.nbytes)
            found[name] = read_tensor(entry)
        return found

    def join(self, ranks: Ranks) -> None:
        """Know what every rank committed, and the hash of every file, which they divide."""
        for committed in ranks.gather(self._committed):
            self._committed |= committed
        sizes = {shard.file: float(shard.size) for shard in self.layout.shards}
        files = list(sizes)
        digests = ranks.each(files, self.file_hash, lambda file: sizes[file])
        self._whole = dict(zip(files, digests, strict=True))

    def file_hash(self, file: str) -> str:
        """SHA-256 of a finished shard; bytes hashed with their unit are not read again."""
        return self._whole.get(file) or self._running(file).finish()

    def _hash_with(self, names: Iterable[str]) -> None:
        """Hash files up to the end of these tensors, which are written. They are read back, from
        memory as a rule: thousands of tensors, handed to the hash one by one, would take Python
        from other threads as often."""
        if not self.alone:
            return
        spans: dict[str, tuple[int, int]] = {}
        for name in names:
            file, begin = self._home[name].file, self._offset(name)
            first, last = spans.get(file, (begin, begin))
            end = begin + self._home[name].tensors[name].nbytes
            spans[file] = min(first, begin), max(last, end)
        for file, (begin, end) in spans.items():
            self._running(file).reach(begin, end)

    def _running(self, file: str) -> _RunningHash:
        if file not in self._hashes:
            self._hashes[file] = _RunningHash(self.shards / file)
        return self._hashes[file]


def _fix(handle: IO[bytes], shard: Shard) -> None:
    for position, data in shard.fixed.items():
        handle.seek(position)
        if handle.read(len(data)) != data:
            handle.seek(position)
            handle.write(data)
    handle.truncate(shard.size)
    handle.flush()
    os.fsync(handle.fileno())


def _write_at(handle: int, data: Sequence[memoryview], offset: int) -> None:
    """Write parts one after the other, many in a call: between calls other threads take Python."""
    for first in range(0, len(data), VECTORS):
        left = list(data[first : first + VECTORS])
        while left:
            done = os.pwritev(handle, left, offset)
            offset += done
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if left:
                left[0] = left[0][done:]


def _digests(data: Mapping[str, memoryview]) -> dict[str, str]:
    return {name: _digest(part) for name, part in data.items()}


def _digest(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


class _RunningHash:
    """SHA-256 of a file that is written mostly in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reached = 0
        self.hash = hashlib.sha256()

    def reach(self, begin: int, end: int) -> None:
        """Hash up to the end of what was just written; from the start, where it had been hashed."""
        if begin < self.reached:
            self.reached, self.hash = 0, hashlib.sha256()
        else:
            self._read_to(end)

    def finish(self) -> str:
        self._read_to(self.path.stat().st_size)
        return self.hash.hexdigest()

    def _read_to(self, end: int) -> None:
        space = memoryview(bytearray(PIECE))
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(self.reached)
            while self.reached < end:
                count = handle.readinto(space[: min(PIECE, end - self.reached)])
                if not count:
                    break
                self.hash.update(space[:count])
                self.reached += count
