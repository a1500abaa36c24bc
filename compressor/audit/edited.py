"""A model that is edited as it is read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.wrapper import Wrapper, wrapped


@dataclass(frozen=True)
class EditedCheckpoint(Wrapper):
    """A checkpoint that reads otherwise in some tensors, and is written nowhere.

    original  where everything comes from
    edits     tensor → what is read in its place, made of it; what is given is not changed
    """

    original: Checkpoint
    edits: Mapping[str, Callable[[Tensor], Tensor]]

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = 4
    ) -> dict[str, Tensor]:
        """The named tensors on the CPU."""
        found = self.original.read(names, pin=pin, threads=threads)
        return {
            name: self.edits[name](tensor) if name in self.edits else tensor
            for name, tensor in found.items()
        }


def edited_checkpoint(
    original: Checkpoint, edits: Mapping[str, Callable[[Tensor], Tensor]]
) -> EditedCheckpoint:
    """The checkpoint with edits."""
    return wrapped(EditedCheckpoint, original, original=original, edits=edits)
