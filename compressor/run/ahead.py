"""Brings the next block to the GPU while the present one is worked on, on a stream of its own: work
there would wait for it, 10 to 40 ms a block."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.ir.floats import fill


class Brought(NamedTuple):
    """Tensors on their way to the device, and what says that they are there."""

    tensors: Mapping[str, Tensor]
    there: torch.cuda.Event


class Ahead:
    """Copies to a GPU beside the work of the stream that is current when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._worker = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: torch.cuda.Event | None = None

    def settle(self) -> None:
        """Wait until the last copy is done: what it read is page-locked memory for the next unit,
        and none is taken beside it."""
        if self._last is not None:
            self._last.synchronize()

    def bring(
        self, tensors: Mapping[str, Tensor], room: Callable[[], Mapping[str, Tensor]]
    ) -> Brought | None:
        """Tensors of the CPU on the device, in memory that `room` makes; None where there is none
        left."""
        with torch.cuda.stream(self._copies):
            try:
                here = fill(room(), tensors)
            except torch.OutOfMemoryError:
                return None
            # When the worker lets go of it, the memory is not used again before all is done that it
            # was asked to by then.
            for tensor in {t.untyped_storage().data_ptr(): t for t in here.values()}.values():
                tensor.record_stream(self._worker)
            self._last = self._copies.record_event()
        return Brought(here, self._last)

    def follow(self, there: torch.cuda.Event) -> None:
        """Let what the worker is asked to from now on wait until tensors are there."""
        self._worker.wait_event(there)
