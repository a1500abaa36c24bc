"""Watches a block while it runs: statistics of every input site, and what a changed weight costs.

Experts are stacked into one module in memory, so what enters an expert's down projection is never
seen by a hook; it is computed from the tokens routed to it, for some experts at a time, when a pass
asks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from compressor_calibration.products import bands
from compressor_calibration.stats import (
    KVNeeds,
    KVStats,
    SiteStats,
    StatNeeds,
    alike,
    count_each,
    update_each,
)
from torch import Tensor, nn

from compressor.ir.floats import replaced
from compressor.ir.layout import Linear, weight_name
from compressor.ranks.divide import owners
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.attention_call import AttentionCall, AttentionHook
from compressor.runner.block_runner import Block
from compressor.runner.rounds import rounds
from compressor.runner.stream import Stream
from compressor.runner.watches import Calls, ExpertTokens, Feed, Watch


class Seen(Exception):
    """Ends a forward pass of which everything wanted has been seen."""


@dataclass(slots=True)
class Observation:
    """What running a block over its calibration inputs gave.

    stats        site → statistics; those of what leaves an expert are computed when asked for
    module_loss  mean squared change of the output of a site's module over the kept inputs, where
                 the weights [out, in] of the named linears are replaced; all ranks ask together
    kv           statistics of keys and values, where they were asked for
    routed       expert → tokens that the router sent there; empty where none was watched
    left_out     input vectors that were not finite, of sites that all tokens enter
    """

    stats: Mapping[str, SiteStats]
    module_loss: Callable[[str, Mapping[str, Tensor]], float]
    kv: KVStats | None = None
    routed: Mapping[int, int] = field(default_factory=dict)
    left_out: int = 0


def observe(
    block: Block,
    stream: Stream,
    *,
    needs: Mapping[str, StatNeeds],
    batch: int,
    kv: KVNeeds | None = None,
    all_experts: bool = False,
    ranks: Ranks = ALONE,
) -> Observation:
    """Statistics of the named sites over all rows that enter a block, and with `kv` of keys and
    values. Those of experts stay computable while the block is in memory.

    ranks  each of which has some of the rows, and then the statistics of all, with the same bits

    all_experts  an expert's statistics are of all tokens, not only of those routed to it
    """
    shape = block.unit.attention
    seen = None
    if kv is not None and shape is not None:
        sides = (shape.kv_heads, shape.head_dim)
        seen = KVStats(*sides, heads=shape.heads, needs=kv, device=block.runner.device)
    with Observer(block, needs=needs, all_experts=all_experts, ranks=ranks) as observer:
        hook = None if seen is None else observer.watch_kv(seen)

        def forward(start: int, stop: int) -> list[Tensor]:
            # In the order of chunks, all of whose predecessors are as long.
            before = start * ranks.world + ranks.rank * batch
            observer.begin(before=before, rows=stop - start)
            with suppress(Seen):
                block.forward(stream.read(start, stop), stream.beside(start, stop))
            return observer.held()

        with block.runner.attention(hook):
            for chunks in rounds(ranks, stream.rows, batch, forward):
                for chunk in chunks:
                    observer.add(chunk)
    stats = observer.finish()
    count_each(list(observer.stats.values()))
    if seen is not None:
        for most in (seen.keys, seen.values, seen.queries):
            ranks.maximum(most)
    return Observation(
        stats=stats,
        module_loss=observer.module_loss,
        kv=seen,
        routed=observer.routed(),
        left_out=sum(found.bad_tokens for found in observer.stats.values()),
    )


class Observer:
    """Hooks on one block for the length of a `with`. A forward pass ends with the last of them."""

    def __init__(
        self,
        block: Block,
        *,
        needs: Mapping[str, StatNeeds],
        all_experts: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.block = block
        self.needs = needs
        self.all_experts = all_experts
        self.ranks = ranks
        self.stats: dict[str, SiteStats] = {}
        self.experts: ExpertTokens | None = None
        self.calls: dict[str, Calls] = {}
        self._hooks = ExitStack()
        self._watched = 0
        self._left: set[int] = set()
        self._fed: list[Watch] = []
        self._held: dict[Watch, list[Tensor]] = {}
        self._chunk = (0, 0)

    def __enter__(self) -> Self:
        unit = self.block.unit
        plain: dict[str, Linear] = {}
        for site in self.needs:
            linears = unit.site_linears(site)
            first = next((linear for linear in linears if linear.expert is None), linears[0])
            if first.role == "expert.down":
                self._watch_experts(first)
            else:
                plain[site] = first
        mine = self._bands(plain)
        for site, first in plain.items():
            needs, device = self.needs[site], self.block.runner.device
            self.stats[site] = SiteStats(first.in_features, needs, device=device, bands=mine[site])
            self._hook(self.block.module(first), Feed(self.stats[site]))
            if needs.keep_inputs:
                self._watch_calls(site, unit.site_linears(site), needs.keep_inputs)
        return self

    def _bands(self, sites: Mapping[str, Linear]) -> dict[str, set[int] | None]:
        """Which bands of each Gram matrix this rank sums: as much as any other, of all sites."""
        if self.ranks.world == 1:
            return dict.fromkeys(sites)
        device = self.block.runner.device
        wanted = {site: x.in_features for site, x in sites.items() if self.needs[site].gram}
        costs = {(s, i): c for s, d in wanted.items() for i, c in enumerate(bands(d, device))}
        owned = dict(zip(costs, owners(list(costs.values()), self.ranks.world), strict=True))
        return {
            s: {i for (t, i), r in owned.items() if (s, r) == (t, self.ranks.rank)} for s in sites
        }

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def begin(self, *, before: int, rows: int) -> None:
        """A forward pass of so many rows begins, and so many rows came before it."""
        self._left = set(range(self._watched))
        self._chunk = before, rows
        self._held = {}

    def held(self) -> list[Tensor]:
        """What a forward pass gave, where it has not been added yet."""
        return [tensor for watch in self._fed for tensor in self._held.get(watch, ())]

    def add(self, chunk: Sequence[Tensor]) -> None:
        """Add what a forward pass gave, here or on another rank."""
        place = 0
        for watch in self._fed if chunk else ():
            watch.add(chunk[place : place + watch.parts])
            place += watch.parts

    def finish(self) -> Mapping[str, SiteStats]:
        """Statistics by site."""
        for stats in self.stats.values():
            for tensor in stats.partial:
                self.ranks.sum(tensor)
        return _LazyStats(self.block, ready=self.stats, experts=self.experts, needs=self.needs)

    def routed(self) -> dict[int, int]:
        """Expert → tokens that the router sent there, of those that were watched."""
        return {} if self.experts is None else self.experts.counted()

    @torch.no_grad()
    def module_loss(self, site: str, weights: Mapping[str, Tensor]) -> float:
        """Mean squared change of the output of a site's module over the kept inputs, where the
        weights [out, in] of the named linears are replaced."""
        calls = self.calls[site]
        if calls.original is None:
            calls.original = calls.run()
        block = self.block
        tried = {weight_name(name): value for name, value in weights.items()}
        block.load(replaced(block.tensors, tried))
        try:
            changed = calls.run()
        finally:
            block.load(block.tensors)
        errors = [
            (place, float((a.float() - b.float()).square().sum(dtype=torch.float64)), a.numel())
            for place, a, b in zip(calls.places, calls.original, changed, strict=True)
        ]
        every = sorted(error for found in self.ranks.gather(errors) for error in found)
        return sum(error for _, error, _ in every) / sum(size for _, _, size in every)

    def watch_kv(self, stats: KVStats) -> AttentionHook:
        """An attention hook that adds the block's keys, values and queries to `stats`, keeps of its
        calls as many tokens as are wanted, and attends as before."""
        seen = self._mark()

        def attend(call: AttentionCall) -> Tensor:
            stats.update(call.key, call.value, call.query)
            before, length = self._chunk[0], call.key.shape[2]
            rows = -(-stats.wanted // length) - before
            if rows > 0:
                few = (x[:rows].detach().clone() for x in (call.query, call.key, call.value))
                query, key, value = few
                kept = replace(call, query=query, key=key, value=value, hidden=None)
                stats.calls.append((before, kept))
            seen()
            return call.plain(call.query, call.key, call.value)

        return attend

    def _mark(self) -> Callable[[], None]:
        """A function that says that one more thing has been seen in this pass; it ends the pass
        where nothing is left."""
        number = self._watched
        self._watched += 1

        def seen() -> None:
            self._left.discard(number)
            if not self._left:
                raise Seen

        return seen

    def _hook(self, module: nn.Module, hook: Watch) -> None:
        seen = self._mark()
        if hook.parts:
            self._fed.append(hook)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = hook.look(args, kwargs, self._chunk)
            if self.ranks.world == 1:
                hook.add(found)  # at once: what was looked at need not stay in memory
            else:
                self._held[hook] = found
            seen()

        self._hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))

    def _watch_experts(self, linear: Linear) -> None:
        if self.experts is None:
            module = self.block.module(linear)
            self.experts = ExpertTokens(self.block.experts(module), every=self.all_experts)
            self._hook(module, self.experts)

    def _watch_calls(self, site: str, linears: Sequence[Linear], tokens: int) -> None:
        """Keep the calls of the module whose output the search is to preserve."""
        if len(linears) == 1:
            module = self.block.module(linears[0])
        else:
            paths = [self.block.runner.names.linear_path(self.block.unit, x) for x in linears]
            parents = [path.split(".")[:-1] for path in paths]
            common = []
            for parts in zip(*parents, strict=False):
                if len(set(parts)) > 1:
                    break
                common.append(parts[0])
            module = self.block.layer.get_submodule(".".join(common))
        self.calls[site] = Calls(module, tokens)
        self._hook(module, self.calls[site])


class _LazyStats(Mapping[str, SiteStats]):
    """Statistics by site; those of an expert's output exist only while they are looked at."""

    def __init__(
        self,
        block: Block,
        *,
        ready: Mapping[str, SiteStats],
        experts: ExpertTokens | None,
        needs: Mapping[str, StatNeeds],
    ) -> None:
        self._block = block
        self._ready = ready
        self._experts = experts
        self._sites = [site for site in needs if site not in ready]
        self._needs = needs
        self._last: tuple[str, SiteStats] | None = None

    def __getitem__(self, site: str) -> SiteStats:
        if site in self._ready:
            return self._ready[site]
        if self._last is None or self._last[0] != site:
            self._last = None
            self._last = (site, self.several([site])[0])
        return self._last[1]

    def several(self, sites: Sequence[str]) -> list[SiteStats]:
        """Those of several sites; of what leaves experts, which are of one shape, made together."""
        if all(site in self._ready for site in sites):
            return [self._ready[site] for site in sites]
        if self._experts is None or not set(sites) <= set(self._sites):
            raise KeyError(sites)
        downs = [self._block.unit.site_linears(site)[0] for site in sites]
        device, needs = self._block.runner.device, self._needs[sites[0]]
        stats = alike(downs[0].in_features, needs, len(downs), device=device)
        experts = [down.expert for down in downs if down.expert is not None]
        for places, inputs in self._experts.entering_down(experts):
            update_each([stats[place] for place in places], inputs)
        count_each(stats)
        return stats

    def __contains__(self, site: object) -> bool:
        return site in self._needs  # and nothing is computed for it

    def __iter__(self) -> Iterator[str]:
        return iter([*self._ready, *self._sites])

    def __len__(self) -> int:
        return len(self._ready) + len(self._sites)
