"""Work on a GPU that runs again and again on tensors at the same addresses: recorded as a CUDA
graph, its kernels are launched at once.

What waits for the device while it runs, as sending tokens to experts does, cannot be recorded.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Work = Callable[[], Sequence[Tensor]]


class Recorder:
    """Makes recordings on one device, one in use at a time, which share their memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.cuda.CUDAGraph | None = None  # its memory is there as long as it is
        # For each stream that it ever saw cuBLAS keeps 32 MiB, and as much for gradients.
        self._stream: torch.cuda.Stream | None = None

    def record(self, work: Work) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
        """The work as a graph, which has not run, and where it will put what it makes.

        Raises RuntimeError where something in it cannot be recorded.
        """
        pool = torch.cuda.graph_pool_handle() if self._last is None else self._last.pool()
        graph = torch.cuda.CUDAGraph()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            # Other threads may allocate and copy meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                made = work()
            finally:
                graph.capture_end()
        self._last = graph
        return graph, made


class Recorded:
    """One piece of work: run as it is the first time, so that whatever is made once is there,
    recorded at the second, and replayed from then on. Where it cannot be recorded, and on other
    devices than GPUs, every run is as the first.

    What it gives is overwritten by the next run.
    """

    def __init__(self, recorder: Recorder, *, recordable: bool = True) -> None:
        self._recorder = recorder
        self._recordable = recordable and recorder.device.type == "cuda"
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._made: Sequence[Tensor] = ()

    @property
    def replays(self) -> bool:
        """Whether it is a graph by now."""
        return self._graph is not None

    def run(self, work: Work) -> Sequence[Tensor]:
        """What the work makes, which is the same at every call but for the values in its places."""
        if self._recordable and self._warm and self._graph is None:
            try:
                self._graph, self._made = self._recorder.record(work)
            except RuntimeError:
                self._recordable = False
        if self._graph is None:
            self._warm = True
            return work()
        self._graph.replay()
        return self._made
