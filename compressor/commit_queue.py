"""Writes and syncs units in the background, in order, while the next ones are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from compressor.shards import ShardWriter


class CommitQueue:
    """Units on their way to disk: at most two wait to be written, any number to be synced."""

    def __init__(
        self, writer: ShardWriter, writes: ThreadPoolExecutor, syncs: ThreadPoolExecutor
    ) -> None:
        self.writer = writer
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
        self.waiting.append(self.writes.submit(self._write, index, tensors, record))

    def _write(
        self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> Future[None]:
        hashes = self.writer.write(tensors)
        return self.syncs.submit(self.writer.commit, index, hashes, record)

    def drain(self) -> None:
        """Wait until everything is committed."""
        while self.waiting:
            self.syncing.append(self.waiting.popleft().result())
        for sync in self.syncing:
            sync.result()
