"""Runs a block of which each rank has some experts: tokens go to them and come back.

Batches run twice. The first time ends at the experts and notes what goes to them; then each rank
makes its experts' part of every batch, one batch of every rank at a time; the second time goes on
from what came back. So ranks wait for each other between batches only while experts compute, and
each batch is as large as it would be alone: an expert gets the same tokens in the same order, and
what all of a token's experts make is added up in one place, in one order. A rank whose memory does
not do the second time halves its batch, and what it has not done goes both ways once more, while
others have nothing left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from compressor.ir.same_shape import homes
from compressor.ranks.ranks import AgreedShortage, Ranks
from compressor.runner.block import Block
from compressor.runner.execution import Execution
from compressor.runner.experts import added_up, own_forward, routing


class _Reached(Exception):
    """Ends a forward pass that has come to the experts."""


@contextmanager
def _answering(block: Block, answer: Callable[..., Tensor]) -> Iterator[None]:
    """Let something else answer in place of the experts' module, for the length of a `with`."""
    module = _module(block)
    before, module.forward = module.forward, answer
    try:
        yield
    finally:
        module.forward = before


def _module(block: Block) -> nn.Module:
    return block.module(next(x for x in block.unit.linears if x.expert is not None))


def batches_of(
    block: Block,
    rows: int,
    attempt: Callable[[int, int], Tensor],
    execution: Execution,
    recorded: Sequence[int] | None,
) -> Iterator[tuple[int, int, Tensor]]:
    """`Execution.batches` of a block; where it is spread, all ranks call it.

    attempt  runs the block for the rows of a batch
    """
    if all(len(groups.experts) == block.unit.experts for groups in block.groups.values()):
        yield from execution.batches(rows, attempt, recorded)
        return
    ranks, done = execution.ranks, 0
    while True:
        sizes, made = _first_time(block, rows, done, attempt, execution, recorded)
        short = False
        with _answering(block, _in_turn(made)):
            for size in sizes:
                try:
                    out = attempt(done, done + size)
                except torch.OutOfMemoryError:
                    short = True
                    break
                yield done, done + size, out
                done += size
        # Other ranks may have halved since: batches made before may be larger.
        lost = short and (recorded is not None or max(size, execution.batch) == 1)
        said = ranks.numbers(rows - done, int(lost))
        if any(lacks for _, lacks in said):
            raise AgreedShortage
        if not any(left for left, _ in said):
            return
        del made
        if short and execution.batch > 1:
            execution.halve()


def _in_turn(made: Iterator[Tensor]) -> Callable[..., Tensor]:
    """A module that answers what was made for each call before."""
    return lambda hidden, *args, **kwargs: next(made).view(hidden.shape)


def _first_time(
    block: Block,
    rows: int,
    done: int,
    attempt: Callable[[int, int], Tensor],
    execution: Execution,
    recorded: Sequence[int] | None,
) -> tuple[list[int], Iterator[Tensor]]:
    """The batches of the rows that are not done, and what experts make of each."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    sizes: list[int] = []

    def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(routing((hidden, *args), kwargs))
        raise _Reached

    def reach(start: int, stop: int) -> None:
        with suppress(_Reached):
            attempt(done + start, done + stop)

    with _answering(block, note):
        for start, stop, _ in execution.batches(rows - done, reach, recorded):
            sizes.append(stop - start)
    return sizes, iter(_made(block, calls, execution.ranks))


@torch.no_grad()
def _made(
    block: Block, calls: Sequence[tuple[Tensor, Tensor, Tensor]], ranks: Ranks
) -> list[Tensor]:
    """What experts make of the tokens of each call, weighted and added up."""
    held, device = block.groups[_module(block)].experts, block.runner.device
    own, _ = block.groups[_module(block)].holding(held.start)
    home = homes(block.unit.linears, ranks.world)
    rank_of = torch.tensor([home[e] for e in sorted(home)], device=device)
    place_of = torch.full_like(rank_of, -1)
    place_of[held.start : held.stop] = torch.arange(len(held), device=device)
    most = max(count for (count,) in ranks.numbers(len(calls)))
    found = []
    for number in range(most):
        mine = calls[number] if number < len(calls) else None
        every = ranks.gather(None if mine is None else mine[:2])
        width, dtype = next((c[0].shape[1], c[0].dtype) for c in every if c is not None)
        nothing = torch.empty(0, width, dtype=dtype, device=device)
        parts = [nothing if call is None else _own(own, *call, place_of) for call in every]
        counts = [0] * ranks.world
        if mine is not None:
            whose = rank_of[mine[1].flatten()]
            counts = torch.bincount(whose, minlength=ranks.world).tolist()
        arrived = ranks.swapped(parts, counts)
        if mine is None:
            continue
        hidden, chosen, weights = mine
        pairs = hidden.new_empty(chosen.numel(), width)
        for rank, part in enumerate(arrived):
            pairs[whose == rank] = part
        found.append(added_up(pairs, chosen, weights))
    return found


def _own(module: nn.Module, hidden: Tensor, chosen: Tensor, place_of: Tensor) -> Tensor:
    """What the experts of a module make of the tokens that go to them, [pairs, hidden], in the
    order of the pairs of a token and an expert."""
    places = place_of[chosen.flatten()]
    pairs = (places >= 0).nonzero()[:, 0]
    tokens = hidden[pairs // chosen.shape[1]]
    if not len(tokens):
        return tokens
    alone = tokens.new_ones(len(tokens), 1)
    return own_forward(module, tokens, places[pairs, None], alone)
