"""Finds ranks that are lost or hang, and ends this process then.

Every rank says by a count that it lives. A count that stands still for `SILENCE` seconds is a rank
that is stopped, whose host is gone, or that hangs without using its processor. Collectives cannot
tell: they wait as long as the longest solve takes.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from compressor.errors import CompressError, Interrupted, printable
from compressor.ranks.launch import LAUNCHER
from compressor.ranks.place import Place

BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one after which a rank is given up."""
GRACE = 5.0
"""Seconds in which a rank may report an error of its own, once another has failed."""
LOST = 3
"""Exit code of a rank that lost another: the same command continues."""


class Watch:
    """Looks after the other ranks, in threads that end the process where one is lost."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._ended = threading.Event()
        self._alive = time.monotonic()
        self._store: Store | None = None
        self._failed: tuple[int, CompressError] | None = None
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._beat, self._guard)
        ]

    def start(self) -> None:
        """Begin, once the place where ranks meet is there."""
        for thread in self._threads:
            thread.start()

    def failed(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        code = 130 if stopped else int(getattr(error, "exit_code", LOST))
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, CompressError):
            text = error.message
        self._say("failed", {"code": code, "text": text})

    def ended(self) -> None:
        """Tell them that it has done its work."""
        self._say("ended", {})

    def _say(self, what: str, about: dict[str, Any]) -> None:
        self._ended.set()
        self._threads[0].join(2 * BEAT)
        # Whoever served it may be gone, and with it all that could be told.
        with suppress(RuntimeError):
            self._connect(2 * BEAT).set(f"{what}/{self.place.rank}", json.dumps(about))

    def _connect(self, seconds: float = SILENCE / 2) -> Store:
        place, wait = self.place, timedelta(seconds=seconds)
        store = TCPStore(place.host, place.port, place.world, False, wait)
        return PrefixStore(f"watch/{place.attempt}", store)

    def _beat(self) -> None:
        """Says that this rank lives, and looks whether the others do."""
        others = [r for r in range(self.place.world) if r != self.place.rank]
        seen: dict[int, tuple[str, float]] = {}
        count = 0
        try:
            store = self._connect()
            while not self._ended.wait(BEAT):
                count += 1
                store.set(f"alive/{self.place.rank}", str(count))
                self._alive = time.monotonic()
                for rank in others:
                    self._look(store, rank, seen)
                self._alive = time.monotonic()
        except RuntimeError as error:
            if not self._ended.wait(GRACE):
                self._end(f"the ranks' meeting point is gone: {str(error).splitlines()[0]}")

    def _look(self, store: Store, rank: int, seen: dict[int, tuple[str, float]]) -> None:
        if store.check([f"failed/{rank}"]):
            about = json.loads(store.get(f"failed/{rank}"))
            if not self._ended.wait(GRACE):
                self._end(f"rank {rank}: {about['text']}", about["code"])
        if store.check([f"ended/{rank}"]):
            return
        now = time.monotonic()
        key = f"alive/{rank}"
        count = store.get(key).decode() if store.check([key]) else ""
        before = seen.get(rank)
        if before is None or before[0] != count:
            seen[rank] = count, now
        elif now - before[1] > SILENCE:
            self._end(f"rank {rank} gave no sign of life for {SILENCE:.0f} seconds")

    def _guard(self) -> None:
        """Ends the process where the meeting point does not answer, or who started it is gone."""
        launcher = os.environ.get(LAUNCHER, str(os.getppid()))
        while not self._ended.wait(BEAT):
            if launcher != str(os.getppid()):
                self._end("the process that started the ranks is gone")
            if time.monotonic() - self._alive > SILENCE:
                self._end("the ranks' meeting point does not answer")

    def _end(self, why: str, code: int = LOST) -> None:
        if self._ended.is_set():
            return
        if self.place.rank == 0 or code == LOST:
            hint = "\n  hint: the same command continues" if code == LOST else ""
            os.write(2, printable(f"error: {why}{hint}\n").encode())
        os._exit(code)


@contextmanager
def watching(place: Place) -> Iterator[Watch]:
    """Look after the other ranks for the length of a `with`, and tell them how it ended."""
    watch = Watch(place)
    watch.start()
    try:
        yield watch
    except BaseException as error:
        watch.failed(error)
        if place.serves:
            time.sleep(2 * BEAT)  # in which the others learn of it
        raise
    watch.ended()
