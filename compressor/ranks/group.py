"""Several processes on torch.distributed: NCCL moves what is on GPUs, gloo all else.

Whatever breaks a connection is one error, after which the same command continues. Nothing here
waits for a time-out: a rank that is lost or hangs is found by its heartbeat (`watch`), since a
time-out would have to outlast the longest solve.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from compressor.errors import CompressError, Interrupted, MachineError
from compressor.ranks.parcel import aligned, hollow, pack, unpack
from compressor.ranks.ranks import AgreedShortage, Form, Ranks

I = TypeVar("I")
T = TypeVar("T")


FRAME = 2**16
"""Bytes that ranks tell each other at once; of more they first say how many."""


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
        home: Callable[[I], int | None] = lambda item: None,
    ) -> list[T]:
        mine = self.owners(items, cost, home)
        found = {i: work(item) for i, item in enumerate(items) if mine[i] == self.rank}
        told = {i: v if home(items[i]) is None else hollow(v) for i, v in found.items()}
        made = {i: value for every in self.gather(told) for i, value in every.items()} | found
        return [made[i] for i in range(len(items))]

    def gathered(self, work: Callable[[], T]) -> list[T]:
        outcome, error = _tried(work)
        every = self.gather(outcome)
        if error is not None:
            raise error
        return [_ending(other, None) for other in every]

    def led(self, work: Callable[[], T]) -> T:
        outcome, error = _tried(work) if self.leads else (_Outcome(), None)
        value: T = _ending(self.share(outcome), error)
        return value

    def share(self, value: T) -> T:
        return self._from(0, value)

    def _from(self, source: int, value: T) -> T:
        """A rank's value on all of them."""
        with lost():
            mine = source == self.rank
            parcel, buffers = pack(value if mine else None)
            (about,) = _framed(pickle.dumps(parcel), partial(self._said_by, source))
            parcel = pickle.loads(about)
            for kind, size in parcel.sizes.items():
                if not mine:
                    buffers[kind] = torch.empty(size, dtype=torch.uint8, device=self._on(kind))
                dist.broadcast(buffers[kind], src=source)
            return value if mine else unpack(parcel, buffers)

    def _said_by(self, source: int, mine: bytes, room: int) -> list[bytes]:
        """So many bytes of one rank."""
        space = _space(mine, room)
        dist.broadcast(space, src=source)
        return [space.numpy().tobytes()]

    def _on(self, kind: str) -> torch.device:
        return self.device if kind == "cuda" else torch.device(kind)

    def gather(self, value: T) -> list[T]:
        """In one exchange, in which all ranks send at a time, unless that takes half as much room
        again as they send."""
        with lost():
            parcel, buffers = pack(value)
            about = _framed(pickle.dumps(parcel), self._said)
            parcels = [parcel if r == self.rank else pickle.loads(about[r]) for r in self._all]
            every: list[dict[str, Tensor]] = [{} for _ in self._all]
            for kind in sorted({kind for found in parcels for kind in found.sizes}):
                sizes = [found.sizes.get(kind, 0) for found in parcels]
                uneven = 2 * self.world * max(sizes) > 3 * sum(sizes)
                meet = self._sent_by_few if uneven else self._sent_by_all
                for r, space in enumerate(meet(buffers.pop(kind, None), sizes, self._on(kind))):
                    every[r][kind] = space
            return [value if r == self.rank else unpack(parcels[r], every[r]) for r in self._all]

    def _sent_by_all(
        self, mine: Tensor | None, sizes: Sequence[int], device: torch.device
    ) -> list[Tensor]:
        """Every rank's bytes, each with the room of the most."""
        room = aligned(max(sizes))
        spaces = torch.empty((self.world, room), dtype=torch.uint8, device=device)
        if mine is not None:
            spaces[self.rank, : len(mine)] = mine
        self._gathered(spaces).wait()
        return [space[:size] for space, size in zip(spaces, sizes, strict=True)]

    def _sent_by_few(
        self, mine: Tensor | None, sizes: Sequence[int], device: torch.device
    ) -> list[Tensor]:
        """The same, where few send most of it, one after the other."""
        others = [0 if r == self.rank else size for r, size in enumerate(sizes)]
        spaces = [torch.empty(size, dtype=torch.uint8, device=device) for size in others]
        if mine is not None:
            spaces[self.rank] = mine
        for r, space in enumerate(spaces):
            if sizes[r]:
                dist.broadcast(space, src=r)
        return spaces

    def _said(self, mine: bytes, room: int) -> list[bytes]:
        """So many bytes of every rank."""
        spaces = torch.empty((self.world, room), dtype=torch.uint8)
        spaces[self.rank] = _space(mine, room)
        self._gathered(spaces).wait()
        return [space.numpy().tobytes() for space in spaces]

    def _gathered(self, spaces: Tensor) -> Any:
        """Fills [world, bytes] with every rank's row; this one's is there."""
        # `all_gather_into_tensor` under the name that PyTorch 2.13 has given it, where it has.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return gather(spaces.view(-1), spaces[self.rank], async_op=True)

    @property
    def _all(self) -> range:
        return range(self.world)

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
                here = [Form.of(t, rows[self.rank]) for t in tensors] if rows[self.rank] else []
                forms += here if min(rows) else self.share(here)
            # One exchange of all tensors, in which every rank sends at a time.
            sizes = [aligned(form.nbytes(max(rows))) for form in forms]
            begins = [sum(sizes[:i]) for i in range(len(sizes))]
            spaces = torch.empty((self.world, sum(sizes)), dtype=torch.uint8, device=self.device)
            for tensor, begin in zip(tensors, begins, strict=False):
                data = _bytes(tensor)
                spaces[self.rank, begin : begin + data.numel()] = data
            work = self._gathered(spaces)

        def arrived() -> list[list[Tensor]]:
            with lost():
                work.wait()
            return [
                [
                    form.within(space[begin:], count)
                    for form, begin in zip(forms, begins, strict=True)
                ]
                for space, count in zip(spaces, rows, strict=True)
                if count
            ]

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

    def beside(self, tensor: Tensor) -> Tensor:
        spaces = tensor.new_empty(self.world, *tensor.shape)
        spaces[self.rank] = tensor
        with lost():
            self._gathered(spaces.view(self.world, -1)).wait()
        return spaces

    def swapped(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        sent = torch.cat(list(parts))
        found = sent.new_empty(sum(counts), *sent.shape[1:])
        with lost():
            dist.all_to_all_single(found, sent, list(counts), [len(part) for part in parts])
        return list(torch.split(found, list(counts)))

    def summed(
        self,
        parts: Iterable[Sequence[Tensor]],
        count: int,
        like: Sequence[Tensor],
        to: Sequence[int],
    ) -> list[Tensor]:
        own = [tensor for tensor, rank in zip(like, to, strict=True) if rank == self.rank]
        sizes = [0] * self.world
        for tensor, rank in zip(like, to, strict=True):
            sizes[rank] += tensor.nbytes
        order = sorted(range(len(to)), key=lambda i: to[i])  # as they are sent
        device, left = like[0].device, iter(parts)
        totals: list[Tensor] = []
        for first in range(0, count, self.world):
            having = min(self.world, count - first)
            got = [sizes[self.rank] if rank < having else 0 for rank in self._all]
            given = sizes if self.rank < having else [0] * self.world
            sent = found = torch.empty(0, dtype=torch.uint8, device=device)
            short = False
            try:
                if self.rank < having:
                    part = next(left)
                    sent = torch.cat([_bytes(part[i]) for i in order])
                    del part
                found = torch.empty(sum(got), dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                short = True
            if self.any(short):
                raise AgreedShortage
            with lost():
                dist.all_to_all_single(found, sent, got, given)
            del sent
            begin = 0
            for rank in range(having):
                for i, tensor in enumerate(own):
                    data = found[begin : begin + tensor.nbytes]
                    part_of = data.view(tensor.dtype).view(tensor.shape)
                    begin += tensor.nbytes
                    if first or rank:
                        totals[i] += part_of
                    else:
                        totals.append(part_of.clone())
        return totals

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


def _tried(work: Callable[[], Any]) -> tuple[_Outcome, BaseException | None]:
    """How a call ended here, and the error that ended it."""
    try:
        return _Outcome(work()), None
    except Interrupted as stopped:
        return _Outcome(interrupted=True), stopped
    except Exception as raised:
        return _Outcome(code=getattr(raised, "exit_code", 3)), raised


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


def _framed(mine: bytes, tell: Callable[[bytes, int], list[bytes]]) -> list[bytes]:
    """Bytes of which nobody else knows how many they are: in one exchange, unless they are many."""
    heads = tell(len(mine).to_bytes(8, "little") + mine[:FRAME], 8 + FRAME)
    sizes = [int.from_bytes(head[:8], "little") for head in heads]
    tails = [b""] * len(heads)
    if max(sizes) > FRAME:
        tails = tell(mine[FRAME:], max(sizes) - FRAME)
    return [(h[8:] + t)[:size] for h, t, size in zip(heads, tails, sizes, strict=True)]


def _space(data: bytes, room: int) -> Tensor:
    """Bytes in a tensor that has room for as many or more."""
    padded = bytearray(data[:room].ljust(room, b"\0"))
    return torch.frombuffer(padded, dtype=torch.uint8) if room else torch.empty(0).byte()


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
