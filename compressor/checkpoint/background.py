"""Writes and syncs units in the background, in order, while the next ones are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
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
                hashes = self.writer.write(tensors, partial(fetched, self.copies.device))
        return self.syncs.submit(self.writer.commit, index, hashes, record)

    def drain(self) -> None:
        """Wait until everything is committed."""
        while self.waiting:
            self.syncing.append(self.waiting.popleft().result())
        for sync in self.syncing:
            sync.result()


def fetched(device: torch.device, tensors: list[Tensor]) -> memoryview:
    """The bytes of tensors, one after the other, in one copy."""
    parts = [t.to(device).contiguous().reshape(-1).view(torch.uint8) for t in tensors if t.numel()]
    return tensor_bytes(torch.cat(parts)) if parts else memoryview(b"")
