"""Float tensors of a unit: in float32 for whoever reads one, and no wider than they are otherwise.

A block in float32 is twice what it is on disk, and rescaling its inputs changes nearly all of it.
Passes work on one linear after the other, so neither is made before it is read, and both are gone
once that linear is coded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
"""A tensor in float32 to what it becomes; its argument is left as it is."""


class Packed(Protocol):
    """A weight as a `QTensor`, or what makes one when it is asked for it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...

    def dequantize(self) -> Tensor: ...

    def to(self, device: torch.device) -> Packed: ...


class Floats(Mapping[str, Tensor]):
    """Tensors by name, in float32 as often as they are asked for.

    stored   in any float dtype, or packed; left as they are
    changes  name → what is done to it, in this order
    device   where they are read; if None, where they are
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor | Packed],
        changes: Mapping[str, tuple[Change, ...]] | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self._stored, self._changes, self.device = stored, changes or {}, device

    def __getitem__(self, name: str) -> Tensor:
        here = self._here(name)
        tensor = here.float() if isinstance(here, Tensor) else here.dequantize()
        for change in self._changes.get(name, ()):
            tensor = change(tensor)
        return tensor

    def _here(self, name: str) -> Tensor | Packed:
        stored = self._stored[name]
        if self.device is None:
            return stored
        if isinstance(stored, Tensor):
            return stored.to(self.device, non_blocking=True)
        return stored.to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def narrow(self, name: str) -> Tensor:
        """A tensor of the same values in the dtype that it is held in, where nothing changed it."""
        here = self._here(name)
        if not isinstance(here, Tensor) or name in self._changes:
            return self[name]
        return here if here.dtype.itemsize <= torch.float32.itemsize else here.float()

    def holds(self, name: str) -> bool:
        """Whether a tensor is there in float32, so that nothing is made for who reads it."""
        stored = self._stored[name]
        if not isinstance(stored, Tensor) or name in self._changes:
            return False
        return stored.dtype == torch.float32 and not self.waits(name)

    def waits(self, name: str) -> bool:
        """Whether a tensor is not where it is read."""
        stored = self._stored[name]
        return self.device is not None and stored.device != self.device

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's, which is not made for it."""
        return tuple(self._stored[name].shape)

    def made_of(self, name: str) -> tuple[object, ...]:
        """What a tensor is made of: of the same objects, in this order, always the same."""
        return (self._stored[name], *self._changes.get(name, ()))

    def replaced(self, tensors: Mapping[str, Tensor]) -> Floats:
        """These with some of them replaced, or more."""
        changes = {name: done for name, done in self._changes.items() if name not in tensors}
        return Floats({**self._stored, **tensors}, changes, device=self.device)

    def changed(self, changes: Mapping[str, Change]) -> Floats:
        """These with something done to some of them."""
        more = {name: (*self._changes.get(name, ()), done) for name, done in changes.items()}
        return Floats(self._stored, {**self._changes, **more}, device=self.device)

    def without(self, names: Collection[str]) -> Floats:
        """All but some."""
        rest = {name: tensor for name, tensor in self._stored.items() if name not in names}
        left = {n: done for n, done in self._changes.items() if n not in names}
        return Floats(rest, left, device=self.device)


def replaced(tensors: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors with some of them replaced, or more; those that stay are not made for it."""
    return tensors.replaced(by) if isinstance(tensors, Floats) else {**tensors, **by}


def narrow(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor as it is held, where that has the same values."""
    return tensors.narrow(name) if isinstance(tensors, Floats) else tensors[name]
