"""A checkpoint some of whose tensors are parts of stored ones, under names of their own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compressor.checkpoint.reader import READ_THREADS, Checkpoint
from compressor.checkpoint.safetensors import Entry
from compressor.checkpoint.wrapper import Wrapper


class Part(Protocol):
    """Where a tensor is: `name` of what is stored, and what of it."""

    @property
    def name(self) -> str: ...

    def read(self, stored: Tensor) -> Tensor:
        """The tensor, out of that."""


@dataclass(frozen=True, slots=True)
class PartsCheckpoint(Wrapper):
    """`inner` with parts of its tensors in place of them; what is stored is read once for all of
    its parts that are asked for together.

    parts  name → where `inner` has it; all other names are its own
    """

    inner: Checkpoint
    parts: Mapping[str, Part]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.inner.nbytes

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = READ_THREADS
    ) -> dict[str, Tensor]:
        """The named tensors on the CPU. Raises InputError for a name that is not there."""
        wanted = list(names)
        return self._parts(wanted, self.inner.read(self._homes(wanted), pin=pin, threads=threads))

    def in_files(self, names: Iterable[str], *, pin: bool = False) -> dict[str, Tensor]:
        """What is stored and holds them."""
        return self.inner.in_files(self._homes(names), pin=pin)

    def view(self, names: Iterable[str], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of that."""
        wanted = list(names)
        return self._parts(wanted, self.inner.view(self._homes(wanted), stored))

    def stored_entries(self) -> list[Entry]:
        """Those of `inner`."""
        return self.inner.stored_entries()

    def _parts(self, names: Iterable[str], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {name: self.parts.get(name) for name in names}
        return {
            name: stored[name] if part is None else part.read(stored[part.name])
            for name, part in parts.items()
        }

    def _homes(self, names: Iterable[str]) -> list[str]:
        every = (self.parts[name].name if name in self.parts else name for name in names)
        return list(dict.fromkeys(every))
