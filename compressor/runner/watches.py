"""What looks at the calls of a block's modules: for statistics, to repeat them, for routing."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from compressor_calibration.stats import SiteStats
from torch import Tensor, nn

from compressor.runner.experts import Experts

TOGETHER = 2**12
"""Tokens for each expert of calls that are taken as one, on average and at least: what one makes of
its own is in memory at a time."""
AT_ONCE = 2**25
"""Values of tokens that several experts are given at a time, or one expert's."""


class Watch(Protocol):
    """Looks at a module's calls.

    parts  how many tensors it makes of a call, as `Ranks.gather_rows` takes them
    """

    parts: int

    def look(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chunk: tuple[int, int]
    ) -> list[Tensor]:
        """What is to be added of a call; `chunk` is how many rows came before, and its own."""

    def add(self, seen: Sequence[Tensor]) -> None:
        """Add it, here or on another rank."""


class Feed:
    """Adds a module's input to statistics."""

    def __init__(self, stats: SiteStats) -> None:
        self.stats, self.parts = stats, stats.parts
        self.add = stats.add

    def look(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chunk: tuple[int, int]
    ) -> list[Tensor]:
        return self.stats.look(args[0] if args else next(iter(kwargs.values())))


class Calls:
    """Keeps a module's calls of the first tokens of all rows, and repeats them.

    places  how many rows came before each call that is kept here
    """

    parts = 0

    def __init__(self, module: nn.Module, tokens: int) -> None:
        self.module = module
        self.wanted = tokens
        self.places: list[int] = []
        self.kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.original: list[Tensor] | None = None

    def look(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chunk: tuple[int, int]
    ) -> list[Tensor]:
        before, rows = chunk
        hidden = args[0] if args else kwargs["hidden_states"]
        if before * (hidden.numel() // hidden.shape[-1] // rows) < self.wanted:
            self.kept.append((args, dict(kwargs)))
            self.places.append(before)
        return []

    def add(self, seen: Sequence[Tensor]) -> None:
        pass

    def run(self) -> list[Tensor]:
        out = [self.module(*args, **kwargs) for args, kwargs in self.kept]
        return [o[0] if isinstance(o, tuple) else o for o in out]


class ExpertTokens:
    """Notes which tokens went to which expert.

    every  statistics are of all tokens nevertheless
    """

    def __init__(self, experts: Experts, *, every: bool) -> None:
        self.experts, self.every = experts, every
        self.parts = experts.parts
        self.tokens_of = experts.unrouted if every else experts.routed
        self.calls: list[Callable[[int], Tensor]] = []
        self.counts: list[Tensor] = []  # of those
        self._apart: list[list[Tensor]] = []  # calls that are not in `calls` yet
        self._each = 0  # tokens of those for each expert

    def look(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chunk: tuple[int, int]
    ) -> list[Tensor]:
        return self.experts.call(args, kwargs)

    def add(self, seen: Sequence[Tensor]) -> None:
        self._apart.append(list(seen))
        self._each += len(seen[0]) if self.every else self.experts.share(seen)
        if self._each >= TOGETHER:
            self._join()

    def counted(self) -> dict[int, int]:
        """Expert → tokens routed to it."""
        self._join()
        return dict(enumerate(torch.stack(self.counts).sum(dim=0).tolist())) if self.counts else {}

    def entering_down(
        self, experts: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], Sequence[Tensor]]]:
        """What enters the down projections of experts, many tokens at a time: of some of them, by
        their places, what each one's is given."""
        self._join()
        for tokens_of in self.calls:
            places: list[int] = []
            tokens: list[Tensor] = []
            for place, expert in enumerate(experts):
                own = tokens_of(expert)
                if places and sum(part.numel() for part in (*tokens, own)) > AT_ONCE:
                    yield places, self._made(experts, places, tokens)
                    places, tokens = [], []
                places.append(place)
                tokens.append(own)
            yield places, self._made(experts, places, tokens)

    def _made(
        self, experts: Sequence[int], places: Sequence[int], tokens: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return self.experts.each_entering_down([experts[place] for place in places], tokens)

    def _join(self) -> None:
        """Take calls as one: an expert gets few tokens of each."""
        if self._apart:
            several = len(self._apart) > 1
            joined = self.experts.joined(self._apart) if several else self._apart[0]
            self.calls.append(self.tokens_of(joined, {}))
            self.counts.append(self.experts.counts(joined, {}))
            self._apart, self._each = [], 0
