"""A block of the quantized model and the original one beside it, each on its own activations."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from compressor_calibration.products import bands, cross_bands
from compressor_calibration.stats import SiteStats, StatNeeds
from torch import Tensor, nn

from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.block_runner import Block
from compressor.runner.observe import Seen
from compressor.runner.rounds import rounds
from compressor.runner.stream import Stream

Side = tuple[Mapping[str, Tensor], Stream]
"""Weights as in `Block.load`, and the rows that enter the block."""


@torch.no_grad()
def observe_beside(
    block: Block,
    sides: Sequence[Side],
    *,
    site: str,
    needs: StatNeeds,
    batch: int,
    ranks: Ranks = ALONE,
) -> SiteStats:
    """Statistics of one site of plain linears, and of the original model's inputs beside them.

    sides  the original, and ours of the same tokens
    ranks  as in `observe.observe`
    The block has its own weights afterwards.
    """
    linear = block.unit.site_linears(site)[0]
    channels, device = linear.in_features, block.runner.device
    stats = SiteStats(
        channels,
        needs,
        device=device,
        bands=None if ranks.world == 1 else _mine(bands(channels, device), ranks),
        cross_bands=None if ranks.world == 1 else set(ranks.own(cross_bands(channels))),
    )
    try:
        with _caught(block.module(linear)) as caught:

            def forward(start: int, stop: int) -> list[Tensor]:
                seen = []
                for weights, stream in sides:
                    block.load(weights)
                    with suppress(Seen):
                        block.forward(stream.read(start, stop), stream.beside(start, stop))
                    seen.append(caught.pop())
                return stats.look(seen[1], seen[0])

            for chunks in rounds(ranks, sides[0][1].rows, batch, forward):
                for chunk in chunks:
                    stats.add(chunk)
    finally:
        block.load(block.tensors)
    for total in stats.partial:
        ranks.sum(total)
    return stats


def _mine(costs: Sequence[float], ranks: Ranks) -> set[int]:
    """The numbers of this rank's pieces of work."""
    return set(ranks.mine(range(len(costs)), lambda number: costs[number]))


@contextmanager
def _caught(module: nn.Module) -> Iterator[list[Tensor]]:
    """A module's input, put here by each forward pass, which ends there, for the length of a
    `with`."""
    found: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else next(iter(kwargs.values())))
        raise Seen

    with module.register_forward_pre_hook(catch, with_kwargs=True):
        yield found
