"""Float tensors of a unit: in float32 for whoever reads one, and no wider than they are otherwise.

A block in float32 is twice what it is on disk, and rescaling its inputs changes nearly all of it.
Passes work on one linear after the other, so neither is made before it is read, and both are gone
once that linear is coded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from compressor.ir.qtensor import QTensor

Change = Callable[[Tensor], Tensor]
"""A tensor in float32 to what it becomes; its argument is left as it is."""


class Floats(Mapping[str, Tensor]):
    """Tensors by name, in float32 as often as they are asked for.

    stored   in any float dtype, or packed; left as they are
    changes  name → what is done to it, in this order
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor | QTensor],
        changes: Mapping[str, tuple[Change, ...]] | None = None,
    ) -> None:
        self._stored, self._changes = stored, changes or {}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        tensor = stored.dequantize() if isinstance(stored, QTensor) else stored.float()
        for change in self._changes.get(name, ()):
            tensor = change(tensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def narrow(self, name: str) -> Tensor:
        """A tensor of the same values in the dtype that it is held in, where nothing changed it."""
        stored = self._stored[name]
        if isinstance(stored, QTensor) or name in self._changes:
            return self[name]
        return stored if stored.dtype.itemsize <= torch.float32.itemsize else self[name]

    def holds(self, name: str) -> bool:
        """Whether a tensor is there in float32, so that nothing is made for who reads it."""
        stored = self._stored[name]
        if isinstance(stored, QTensor) or name in self._changes:
            return False
        return stored.dtype == torch.float32

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's, which is not made for it."""
        return tuple(self._stored[name].shape)

    def made_of(self, name: str) -> tuple[object, ...]:
        """What a tensor is made of: of the same objects, in this order, always the same."""
        return (self._stored[name], *self._changes.get(name, ()))

    def replaced(self, tensors: Mapping[str, Tensor]) -> Floats:
        """These with some of them replaced, or more."""
        changes = {name: done for name, done in self._changes.items() if name not in tensors}
        return Floats({**self._stored, **tensors}, changes)

    def changed(self, changes: Mapping[str, Change]) -> Floats:
        """These with something done to some of them."""
        more = {name: (*self._changes.get(name, ()), done) for name, done in changes.items()}
        return Floats(self._stored, {**self._changes, **more})

    def without(self, names: Collection[str]) -> Floats:
        """All but some."""
        rest = {name: tensor for name, tensor in self._stored.items() if name not in names}
        return Floats(rest, {n: done for n, done in self._changes.items() if n not in names})


def replaced(tensors: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors with some of them replaced, or more; those that stay are not made for it."""
    return tensors.replaced(by) if isinstance(tensors, Floats) else {**tensors, **by}


def narrow(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor as it is held, where that has the same values."""
    return tensors.narrow(name) if isinstance(tensors, Floats) else tensors[name]
