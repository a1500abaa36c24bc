"""A value as bytes, with its tensors beside them, to be sent to another process of the same run."""

import io
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ALIGNED = 256
"""Bytes at whose multiples tensors begin: any dtype may be viewed there, and a product chooses its
kernel as it does for a tensor of its own."""


class Part(NamedTuple):
    """Where a tensor lies in the buffer of its kind of device."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class Parcel(NamedTuple):
    """A packed value.

    data   the value but for its tensors;  parts  those
    sizes  bytes of the buffer of each kind of device
    """

    data: bytes
    parts: list[Part]
    sizes: dict[str, int]


def pack(value: Any) -> tuple[Parcel, dict[str, Tensor]]:
    """A value, and for each kind of device (cpu, cuda) the bytes of its tensors in one buffer."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    flat: dict[str, list[Tensor]] = {}
    parts: list[Part] = []
    sizes: dict[str, int] = {}
    gaps: dict[str, Tensor] = {}
    for tensor in pickler.found:
        if tensor.is_meta:
            parts.append(Part("meta", tensor.dtype, tuple(tensor.shape), 0, 0))
            continue
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        kind, begin, shape = tensor.device.type, sizes.get(tensor.device.type, 0), tensor.shape
        parts.append(Part(kind, tensor.dtype, tuple(shape), begin, data.numel()))
        sizes[kind] = aligned(begin + data.numel())
        if kind not in gaps:
            gaps[kind] = torch.empty(ALIGNED, dtype=torch.uint8, device=tensor.device)
        gap = gaps[kind][: sizes[kind] - begin - data.numel()]
        flat.setdefault(kind, []).extend([data, gap])
    buffers = {kind: torch.cat(found) for kind, found in flat.items()}
    return Parcel(stream.getvalue(), parts, sizes), buffers


def aligned(nbytes: int) -> int:
    """So many bytes, or a few more after which any dtype may begin."""
    return -(-nbytes // ALIGNED) * ALIGNED


def unpack(parcel: Parcel, buffers: dict[str, Tensor]) -> Any:
    """The value; its tensors are parts of the buffers."""
    found = []
    for part in parcel.parts:
        if part.nbytes:
            data = buffers[part.device][part.begin : part.begin + part.nbytes]
            found.append(data.view(part.dtype).view(part.shape))
        else:
            device = buffers[part.device].device if part.device in buffers else part.device
            found.append(torch.empty(part.shape, dtype=part.dtype, device=device))
    return _Unpickler(io.BytesIO(parcel.data), found).load()


def hollow(value: T) -> T:
    """The same value with tensors on the meta device in the place of those in it."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    shapes = [torch.empty_like(tensor, device="meta") for tensor in pickler.found]
    made: T = _Unpickler(io.BytesIO(stream.getvalue()), shapes).load()
    return made


class _Pickler(pickle.Pickler):
    """Notes tensors and leaves their numbers. `persistent_id` would be called of every value there
    is, and reports of experts have tens of thousands."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.found: list[Tensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        self.found.append(value)
        return _tensor, (len(self.found) - 1,)


def _tensor(number: int) -> Tensor:
    """Stands in a pickle for what gives a tensor by its number."""
    raise LookupError(f"tensor {number} of a parcel that nobody unpacks")


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(stream)
        self.tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, _tensor.__name__):
            return self.tensors.__getitem__
        return super().find_class(module, name)
