"""Several processes on torch.distributed: NCCL moves what is on GPUs, gloo all else.

Whatever breaks a connection is one error, after which the same command continues. Nothing here
waits for a time-out: a rank that is lost or hangs is found by its heartbeat (`watch`), since a
time-out would have to outlast the longest solve.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from compressor.errors import CompressError, Interrupted, MachineError
from compressor.ranks.divide import owners
from compressor.ranks.parcel import Parcel, pack, unpack
from compressor.ranks.ranks import Form, Ranks

I = TypeVar("I")
T = TypeVar("T")


class ElsewhereError(CompressError):
    """What ended another rank, which tells of it."""

    def __init__(self, code: int) -> None:
        super().__init__("another rank failed")
        self.exit_code = code


class _Outcome(NamedTuple):
    """What a call gave on one rank, or how it ended: an exit code, or None."""

    value: Any = None
    code: int | None = None
    interrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(Ranks):
    """One rank of several.

    device  on which it computes
    """

    device: torch.device

    def each(
        self,
        items: Sequence[I],
        work: Callable[[I], T],
        cost: Callable[[I], float] = lambda item: 1.0,
    ) -> list[T]:
        mine = owners([cost(item) for item in items], self.world)
        found = {i: work(item) for i, item in enumerate(items) if mine[i] == self.rank}
        made: dict[int, T] = {}
        for rank in sorted(set(mine)):
            made |= self._from(rank, found)
        return [made[i] for i in range(len(items))]

    def led(self, work: Callable[[], T]) -> T:
        outcome: _Outcome = _Outcome()
        error: BaseException | None = None
        if self.leads:
            try:
                outcome = _Outcome(work())
            except Interrupted as stopped:
                outcome, error = _Outcome(interrupted=True), stopped
            except Exception as raised:
                outcome, error = _Outcome(code=getattr(raised, "exit_code", 3)), raised
        value: T = _ending(self.share(outcome), error)
        return value

    def share(self, value: T) -> T:
        return self._from(0, value)

    def _from(self, source: int, value: T) -> T:
        """A rank's value on all of them."""
        with lost():
            mine = source == self.rank
            parcel, buffers = pack(value) if mine else (None, {})
            parcel = self._object(source, parcel)
            for kind, size in parcel.sizes.items():
                if not mine:
                    buffers[kind] = torch.empty(size, dtype=torch.uint8, device=self._on(kind))
                dist.broadcast(buffers[kind], src=source)
            return value if mine else unpack(parcel, buffers)

    def _object(self, source: int, parcel: Parcel | None) -> Parcel:
        found = [parcel]
        dist.broadcast_object_list(found, src=source, device=torch.device("cpu"))
        assert found[0] is not None
        return found[0]

    def _on(self, kind: str) -> torch.device:
        return self.device if kind == "cuda" else torch.device(kind)

    def gather(self, value: T) -> list[T]:
        return [self._from(rank, value) for rank in range(self.world)]

    def send(self, value: Any, to: int) -> Callable[[], None]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        parts = [torch.tensor([data.numel()]), data]  # held until they have arrived
        with lost():
            works = [dist.isend(part, to) for part in parts]

        def arrived() -> None:
            with lost():
                for work, _ in zip(works, parts, strict=True):
                    assert work is not None
                    work.wait()

        return arrived

    def receive(self, source: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        with lost():
            dist.recv(size, source)
            data = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(data, source)
        return pickle.loads(data.numpy().tobytes())

    def agree(self, value: int, what: str) -> None:
        every = [said for (said,) in self.numbers(value)]
        if len(set(every)) > 1:
            raise MachineError(
                f"ranks do not agree on {what}",
                hint="do all hosts see the same files? One process can do it alone",
            )

    def gather_rows(
        self, tensors: Sequence[Tensor], rows: Sequence[int], forms: list[Form]
    ) -> Callable[[], list[list[Tensor]]]:
        with lost():
            if not forms:
                forms += self.share([Form.of(t, rows[0]) for t in tensors])
            works, found = [], [[Tensor()] * len(forms) for _ in rows]
            for number, form in enumerate(forms):
                spaces = [form.space(count, self.device) for count in rows]
                if rows[self.rank]:
                    spaces[self.rank] = tensors[number].contiguous()
                for rank, space in enumerate(spaces):
                    found[rank][number] = space
                    if space.numel():
                        works.append(dist.broadcast(_bytes(space), src=rank, async_op=True))

        def arrived() -> list[list[Tensor]]:
            with lost():
                for work in works:
                    if work is not None:
                        work.wait()
            return [row for row, count in zip(found, rows, strict=True) if count]

        return arrived

    def join_rows(self, tensor: Tensor, batch: int) -> Tensor:
        every = self.gather(tensor)
        found = torch.cat(every)
        order = [
            row
            for rank in range(self.world)
            for row in replace(self, rank=rank).rows(found.shape[0], batch)
        ]
        return found[torch.tensor(order).argsort()]

    def sum(self, tensor: Tensor) -> Tensor:
        with lost():
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        with lost():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def numbers(self, *values: int) -> list[tuple[int, ...]]:
        mine = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        with lost():
            dist.all_gather(found, mine)
        return [tuple(int(x) for x in row) for row in found]

    def any(self, flag: bool) -> bool:
        return any(said for (said,) in self.numbers(int(flag)))

    @contextmanager
    def leading(self, context: AbstractContextManager[T]) -> Iterator[T]:
        if not self.leads:
            yield self.led(_nothing)
            return
        outcome, error, ended = _Outcome(), None, True
        try:
            outcome = _Outcome(context.__enter__())
        except Exception as raised:
            outcome, error = _Outcome(code=getattr(raised, "exit_code", 3)), raised
        value: T = _ending(self.share(outcome), error)
        try:
            yield value
        except BaseException as raised:
            ended = False
            if not context.__exit__(type(raised), raised, raised.__traceback__):
                raise
        if ended:
            context.__exit__(None, None, None)

    def barrier(self) -> None:
        self.numbers(0)


def _nothing() -> Any:
    """What the others do while the leading rank works."""


def _ending(outcome: _Outcome, error: BaseException | None) -> Any:
    """What a call gave; raises what ended it where it was made, and elsewhere what stands for it.
    Nothing here is silent: the leading rank reports."""
    if error is not None:
        raise error
    if outcome.interrupted:
        raise Interrupted
    if outcome.code is not None:
        raise ElsewhereError(outcome.code)
    return outcome.value


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@contextmanager
def lost() -> Iterator[None]:
    """What breaks a connection, as a MachineError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0].partition(". This is typically")[0]
        raise MachineError(
            f"the connection to another rank broke: {first}",
            hint="a rank was killed, ran out of memory or lost its network; the same command "
            "continues, also with another number of ranks",
        ) from error
