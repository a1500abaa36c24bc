"""Float tensors of a unit: in float32 for whoever reads one, and no wider than they are otherwise.

A block in float32 is twice what it is on disk, and rescaling its inputs changes nearly all of it.
Passes work on one linear after the other, so neither is made before it is read, and both are gone
once that linear is coded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
"""A tensor in float32 to what it becomes; its argument is left as it is."""


@runtime_checkable
class Joint(Protocol):
    """A change that may be done to several tensors of one shape at once.

    kind  equal for those that may
    """

    @property
    def kind(self) -> Hashable: ...

    def __call__(self, tensor: Tensor, /) -> Tensor: ...

    def of_each(self, every: Sequence[Any], stack: Tensor) -> Tensor:
        """Each change done to its tensor of a stack, in float32, to the bits of each alone."""
        ...


class Packed(Protocol):
    """A weight as a `QTensor`, or what makes one when it is asked for it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...

    def dequantize(self) -> Tensor: ...

    def to(self, device: torch.device) -> Packed: ...


class MadeWhenRead(Mapping[str, Tensor]):
    """Tensors that are made when they are read, and not for who asks which there are."""

    names: Collection[str]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Floats(MadeWhenRead):
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
        self.names = stored

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

    def narrow(self, name: str) -> Tensor:
        """A tensor of the same values in the dtype that it is held in, where nothing changed it."""
        if not isinstance(self._stored[name], Tensor) or name in self._changes:
            return self[name]
        here = self._here(name)
        assert isinstance(here, Tensor)
        return here if here.dtype.itemsize <= torch.float32.itemsize else here.float()

    def stacked(self, names: Sequence[str]) -> Tensor:
        """Tensors of one shape along a new first dimension, as if read one by one: of experts each
        step for each of them would be a kernel."""
        alike: dict[Hashable, list[int]] = {}
        for place, name in enumerate(names):
            stored, changes = self._stored[name], self._changes.get(name, ())
            kinds = tuple(x.kind if isinstance(x, Joint) else None for x in changes)
            kind: Hashable = name
            if isinstance(stored, Tensor) and None not in kinds:
                kind = (stored.dtype, *kinds)
            alike.setdefault(kind, []).append(place)
        parts = [self._joined([names[i] for i in places]) for places in alike.values()]
        if len(parts) == 1:
            return parts[0]
        out = parts[0].new_empty(len(names), *parts[0].shape[1:])
        for places, part in zip(alike.values(), parts, strict=True):
            step = max(1, places[-1] - places[0]) // max(1, len(places) - 1)
            if places == list(range(places[0], places[-1] + 1, step)):
                out[places[0] : places[-1] + 1 : step] = part
            else:
                for place, one in zip(places, part, strict=True):
                    out[place] = one
        return out

    def _joined(self, names: Sequence[str]) -> Tensor:
        """Those that the same is done to."""
        if len(names) == 1:
            return self[names[0]][None]
        made = torch.stack([here for x in names if isinstance(here := self._here(x), Tensor)])
        made = made.float()
        for every in zip(*(self._changes.get(name, ()) for name in names), strict=True):
            assert isinstance(every[0], Joint)
            made = every[0].of_each(every, made)
        return made

    def holds(self, name: str) -> bool:
        """Whether a tensor is there in float32, so that nothing is made for who reads it."""
        stored = self._stored[name]
        if not isinstance(stored, Tensor) or name in self._changes:
            return False
        return stored.dtype == torch.float32 and not self.waits(name)

    def waits(self, name: str) -> bool:
        """Whether a tensor is not where it is read."""
        return self.device is not None and self._stored[name].device != self.device

    def home(self, name: str) -> torch.device:
        """Where a tensor is held."""
        return self._stored[name].device

    def elsewhere(self, name: str) -> bool:
        """Whether another rank has a tensor, and here it is on the meta device."""
        return self._stored[name].device.type == "meta"

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's, which is not made for it."""
        return tuple(self._stored[name].shape)

    def made_of(self, name: str) -> tuple[object, ...]:
        """What a tensor is made of: of the same objects, in this order, always the same."""
        return (self._stored[name], *self._changes.get(name, ()))

    def replaced(self, by: Mapping[str, Tensor | Packed]) -> Floats:
        """These with some of them replaced, or more; what takes the place of one that waits
        elsewhere waits there, too."""
        changes = {name: done for name, done in self._changes.items() if name not in by}
        tensors = {
            name: value.to(self.home(name)) if name in self and self.waits(name) else value
            for name, value in by.items()
        }
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


class Moved(MadeWhenRead):
    """Tensors that are brought to a device when they are read, each time.

    dtype  that they get there, if another
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tensors, self.device, self.dtype = tensors, device, dtype
        self.names = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.device, self.dtype, non_blocking=True)

    def elsewhere(self, name: str) -> bool:
        """As in `Floats`."""
        return elsewhere(self.tensors, name)


def replaced(tensors: Mapping[str, Tensor], by: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors with some of them replaced, or more; those that stay are not made for it."""
    if isinstance(tensors, Moved):
        return Moved(replaced(tensors.tensors, by), tensors.device, tensors.dtype)
    return tensors.replaced(by) if isinstance(tensors, Floats) else {**tensors, **by}


def elsewhere(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether another rank has a tensor, and here it is on the meta device; it is not made to
    tell."""
    told = getattr(tensors, "elsewhere", None)
    return tensors[name].is_meta if told is None else bool(told(name))


def room_for(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Memory on a device for tensors; those that are there, or another rank's, as they are."""
    return {
        name: t if t.is_meta or t.device == device else torch.empty_like(t, device=device)
        for name, t in tensors.items()
    }


def fill(room: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into what `room_for` gave, without waiting for it. It is one call: with each
    other threads take Python, and experts are hundreds of tensors."""
    pairs = [(room[name], tensor) for name, tensor in tensors.items() if room[name] is not tensor]
    if pairs:
        into, read = zip(*pairs, strict=True)
        torch._foreach_copy_(into, read, non_blocking=True)
    return {name: room[name] for name in tensors}


def narrow(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor as it is held, where that has the same values."""
    return tensors.narrow(name) if isinstance(tensors, Floats) else tensors[name]


def home_of(tensors: Mapping[str, Tensor], name: str) -> torch.device | None:
    """Where a tensor waits that is read elsewhere; None for any other."""
    waits = isinstance(tensors, Floats) and name in tensors and tensors.waits(name)
    return tensors.home(name) if waits and isinstance(tensors, Floats) else None
