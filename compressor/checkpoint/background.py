"""Writes and syncs units in the background, in order, while the next ones are worked on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.safetensors import tensor_bytes
from compressor.checkpoint.shards import ShardWriter


class CommitQueue:
    """Units on their way to disk: at most two wait to be written, any number to be synced."""

    def __init__(
        self,
        writer: ShardWriter,
        writes: ThreadPoolExecutor,
        syncs: ThreadPoolExecutor,
        device: torch.device,
    ) -> None:
        self.writer = writer
        # Copies on the stream of the next unit's work would wait for it, and hold it up.
        self.copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.writes = writes
        self.syncs = syncs
        self.waiting: deque[Future[Future[None]]] = deque()
        self.syncing: list[Future[None]] = []

    def put(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Have a unit written and committed; raises what failed of those before it."""
        while len(self.waiting) >= 2:
            self.syncing.append(self.waiting.popleft().result())
        for sync in [sync for sync in self.syncing if sync.done()]:
            sync.result()
            self.syncing.remove(sync)
        made = None
        if self.copies is not None:
            made = torch.cuda.current_stream(self.copies.device).record_event()
        self.waiting.append(self.writes.submit(self._write, index, tensors, record, made))

    def _write(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        record: Mapping[str, Any],
        made: torch.cuda.Event | None,
    ) -> Future[None]:
        if self.copies is None or made is None:
            hashes = self.writer.write(tensors)
        else:
            with torch.cuda.stream(self.copies):
                self.copies.wait_event(made)
                data = fetched(tensors)
            hashes = self.writer.write(tensors, data)
        return self.syncs.submit(self.writer.commit, index, hashes, record)

    def drain(self) -> None:
        """Wait until everything is committed."""
        while self.waiting:
            self.syncing.append(self.waiting.popleft().result())
        for sync in self.syncing:
            sync.result()


def fetched(tensors: Mapping[str, Tensor]) -> dict[str, memoryview]:
    """The bytes of tensors, on the CPU. A piece of memory of which they are a good part is copied
    as a whole: with each copy other threads take Python, and experts are thousands of tensors."""
    wanted: Counter[int] = Counter()
    for tensor in tensors.values():
        wanted[tensor.untyped_storage().data_ptr()] += tensor.nbytes
    pieces: dict[int, memoryview] = {}
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        place, begin = storage.data_ptr(), tensor.storage_offset() * tensor.itemsize
        if not tensor.is_contiguous() or 4 * wanted[place] < storage.nbytes():
            found[name] = tensor_bytes(tensor)
            continue
        if place not in pieces:
            empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            pieces[place] = tensor_bytes(empty.set_(storage))  # type: ignore[call-overload]
        found[name] = pieces[place][begin : begin + tensor.nbytes]
    return found
