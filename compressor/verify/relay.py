"""Rows on their way through the original's blocks, which several ranks have in turn."""

from collections.abc import Callable
from dataclasses import dataclass

from compressor.ranks.ranks import Ranks
from compressor.runner.stream import Stream


@dataclass(slots=True)
class Relay:
    """What leaves each block enters the next one, which the next rank checks meanwhile.

    ranks   unit i is with rank i modulo their number, the first with all of them
    last    index of the last block's unit
    stream  the rows after unit `at`, the last that was here; they have nothing beside them
    """

    ranks: Ranks
    last: int
    stream: Stream
    at: int = 0
    arrived: Callable[[], object] | None = None

    def enter(self, unit: int) -> Stream:
        """What enters a block, given its unit's index."""
        if self.at != unit - 1:
            device = self.stream.hidden.device
            hidden, handed = self.ranks.receive((unit - 1) % self.ranks.world)
            here = {name: tensor.to(device) for name, tensor in handed.items()}
            self.stream, self.at = Stream(hidden.to(device), handed=here), unit - 1
        return self.stream

    def leave(self, unit: int, stream: Stream) -> None:
        """What left it goes on."""
        self.stream, self.at = stream, unit
        if self.ranks.world > 1 and unit < self.last:
            if self.arrived is not None:
                self.arrived()
            # By way of main memory: no connection of GPUs by pairs for so little.
            handed = {name: tensor.cpu() for name, tensor in stream.handed.items()}
            to = (unit + 1) % self.ranks.world
            self.arrived = self.ranks.send((stream.hidden.cpu(), handed), to)

    def skip(self, unit: int) -> None:
        """A block that cannot be run leaves what entered it."""
        if self.at != unit:
            self.leave(unit, self.enter(unit))
