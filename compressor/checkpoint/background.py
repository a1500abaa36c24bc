"""Writes and syncs units in the background, in order, while the next ones are worked on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressor.checkpoint.safetensors import tensor_bytes
from compressor.checkpoint.shards import ShardWriter
from compressor.ranks.ranks import ALONE, Ranks


class _Waiting(NamedTuple):
    """A unit that is being written: its record, and the hashes of what this rank writes of it."""

    number: int
    record: Mapping[str, Any]
    written: Future[dict[str, str]]


class CommitQueue:
    """Units on their way to disk, for the length of a `with`: at most two wait to be written, any
    number to be synced. What is under way when it ends with an error is committed all the same.

    A unit's tensors are fetched from a GPU at once, which holds none of it while it waits.
    ranks  that write some tensors of each unit; the leading one commits it. All call alike, and
           what fails on one of them ends all
    """

    def __init__(self, writer: ShardWriter, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.writer = writer
        self.ranks = ranks
        # Copies on the stream of the next unit's work would wait for it, and hold it up.
        self.copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.waiting: deque[_Waiting] = deque()
        self.syncing: list[Future[None]] = []

    def __enter__(self) -> CommitQueue:
        self._threads = ExitStack()
        self.syncs, self.writes, self.fetches = (
            self._threads.enter_context(ThreadPoolExecutor(1)) for _ in range(3)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.close()

    def put(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Have a unit written, of which these tensors are this rank's, and committed; raises what
        failed of those before it."""
        done = 0
        while done < len(self.waiting) and self.waiting[done].written.done():
            done += 1
        # What some rank still writes is not waited for, unless it is the second.
        done = min(count for (count,) in self.ranks.numbers(done))
        self._leave(max(done, len(self.waiting) - 1))
        self.ranks.led(self._look)
        made = None
        if self.copies is not None:
            made = torch.cuda.current_stream(self.copies.device).record_event()
        data = self.fetches.submit(self._fetch, tensors, made)
        written = self.writes.submit(self._write, index, data, record)
        self.waiting.append(_Waiting(index, record, written))

    def _fetch(
        self, tensors: Mapping[str, Tensor], made: torch.cuda.Event | None
    ) -> dict[str, memoryview]:
        self.writer.check(tensors)
        if self.copies is None or made is None:
            return fetched(tensors)
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(made)
            return fetched(tensors)

    def _write(
        self, index: int, data: Future[dict[str, memoryview]], record: Mapping[str, Any]
    ) -> dict[str, str]:
        hashes = self.writer.write(data.result())
        if self.ranks.world == 1:
            self._commit(index, hashes, record)
        return hashes

    def _commit(self, index: int, hashes: Mapping[str, str], record: Mapping[str, Any]) -> None:
        self.syncing.append(self.syncs.submit(self.writer.commit, index, hashes, record))

    def _look(self) -> None:
        """Raises what failed of what has been synced."""
        for sync in [sync for sync in self.syncing if sync.done()]:
            sync.result()
            self.syncing.remove(sync)

    def _leave(self, count: int) -> None:
        """Wait until so many units are written by all ranks; the leading one commits them."""
        for _ in range(count):
            unit = self.waiting.popleft()
            every = self.ranks.gathered(unit.written.result)
            if self.ranks.world > 1 and self.ranks.leads:
                hashes = {name: digest for some in every for name, digest in some.items()}
                self._commit(unit.number, hashes, unit.record)

    def drain(self) -> None:
        """Wait until everything is committed."""
        self._leave(len(self.waiting))
        self.ranks.led(lambda: [sync.result() for sync in self.syncing])


def fetched(tensors: Mapping[str, Tensor]) -> dict[str, memoryview]:
    """The bytes of tensors, on the CPU. A piece of memory of which they are a good part is copied
    as a whole: with each copy other threads take Python, and experts are thousands of tensors.

    From a GPU they are copied into page-locked memory, on the current stream: while other memory
    was copied to, other threads waited long to start anything there.
    """
    wanted: Counter[int] = Counter()
    for tensor in tensors.values():
        wanted[tensor.untyped_storage().data_ptr()] += tensor.nbytes
    pieces: dict[int, memoryview] = {}
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        place, begin = storage.data_ptr(), tensor.storage_offset() * tensor.itemsize
        if not tensor.is_contiguous() or 4 * wanted[place] < storage.nbytes():
            found[name] = tensor_bytes(_on_cpu(tensor.contiguous()))
            continue
        if place not in pieces:
            empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            whole = empty.set_(storage)  # type: ignore[call-overload]
            pieces[place] = tensor_bytes(_on_cpu(whole))
        found[name] = pieces[place][begin : begin + tensor.nbytes]
    for device in {tensor.device for tensor in tensors.values()}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return found


def _on_cpu(tensor: Tensor) -> Tensor:
    """A contiguous tensor, which is there once the current stream has come so far."""
    if tensor.device.type != "cuda":
        return tensor.detach().cpu()
    space = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return space.copy_(tensor.detach(), non_blocking=True)
