"""A checkpoint that reads another in its own way: parts of it, floats made of its codes."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

from compressor.checkpoint.reader import Checkpoint, digests_of

Wrapped = TypeVar("Wrapped", bound="Wrapper")


@dataclass(frozen=True, slots=True)
class Wrapper(Checkpoint):
    """A checkpoint whose `read` gives something else than what files hold for its entries."""

    def read_hashed(
        self, names: Iterable[str], *, pin: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """`read`, and the SHA-256 of each tensor's bytes: of what is given, once it is made."""
        raw = self.read(names, pin=pin)
        return raw, digests_of(raw)

    def pieces(self, names: Iterable[str]) -> list[int]:
        """As in `Checkpoint`: one for each tensor."""
        return [self.entry(name).spec.nbytes for name in names]


def wrapped(kind: type[Wrapped], checkpoint: Checkpoint, **own: Any) -> Wrapped:
    """A checkpoint of another kind which but for what is given has what this one has."""
    same = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    return kind(**{**same, **own})
