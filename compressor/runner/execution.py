"""How rows run on this machine.

Running out of the device's memory halves the batch, and a walk ends early in one way:
`Execution.stopping`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from compressor.errors import Interrupted
from compressor.ranks.ranks import ALONE, AgreedShortage, Ranks
from compressor.runner.rounds import rounds

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with a unit's name, how many units are done, and how many there are."""


@dataclass(slots=True)
class Execution:
    """How rows run on this machine.

    batch     rows in one forward pass; halved for good where the device's memory does not do
    offload   keep hidden states in main memory, in float32, between blocks; otherwise they stay on
              the device as they were computed
    stopping  asked before each unit; the walk then raises Interrupted, on all ranks or on none
    progress  called after each unit
    ranks     that run rows of their own each; batches and ends are the same on all
    """

    batch: int
    offload: bool = True
    stopping: Callable[[], bool] = lambda: False
    progress: Progress = lambda name, done, total: None
    ranks: Ranks = ALONE

    def check_stop(self) -> None:
        """Raises Interrupted when asked to stop."""
        if self.stopping():
            raise Interrupted

    def halving(self, attempt: Callable[[int], T]) -> T:
        """What an attempt gives with as many rows at a time as memory allows."""
        while True:
            try:
                return attempt(self.batch)
            except torch.OutOfMemoryError as error:
                if self.ranks.world > 1 and not isinstance(error, AgreedShortage):
                    raise  # the others know nothing of it
                self._halve()

    def batches(
        self, rows: int, attempt: Callable[[int, int], T], recorded: Sequence[int] | None = None
    ) -> Iterator[tuple[int, int, T]]:
        """(start, stop, what an attempt gives) for all rows, some at a time. What is done stays
        done where memory runs out.

        recorded  sizes of batches that were taken before, which are taken again
        """
        start, number = 0, 0
        while start < rows:
            size = self.batch if recorded is None else recorded[number]
            stop = min(start + size, rows)
            try:
                made = attempt(start, stop)
            except torch.OutOfMemoryError:
                if recorded is not None:
                    raise
                self._halve()
                continue
            yield start, stop, made
            start, number = stop, number + 1
        self.batch = min(batch for (batch,) in self.ranks.numbers(self.batch))

    def dealt(
        self, rows: int, attempt: Callable[[int, int], Tensor]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """`batches` that ranks run in turn: each gets those of all, in their order."""
        ranks = self.ranks
        if ranks.world == 1:
            yield from self.batches(rows, attempt)
            return
        done = 0
        while done < rows:
            batch, first = self.batch, done + ranks.rank * self.batch

            def forward(start: int, stop: int, first: int = first) -> list[Tensor]:
                begin = first + start * ranks.world
                return [attempt(begin, begin + stop - start)]

            try:
                for chunks in rounds(ranks, len(ranks.rows(rows - done, batch)), batch, forward):
                    for (chunk,) in chunks:
                        yield done, done + chunk.shape[0], chunk
                        done += chunk.shape[0]
            except AgreedShortage:
                self._halve()

    def halve(self) -> None:
        """Half as many rows at a time from now on."""
        self.batch //= 2
        torch.cuda.empty_cache()

    def _halve(self) -> None:
        """Called while the error is handled, which is raised again where there is but one row."""
        if self.batch == 1:
            raise
        self.halve()
