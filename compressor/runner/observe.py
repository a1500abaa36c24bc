"""Watches a block while it runs: statistics of every input site, and what a changed weight costs.

Experts are stacked into one module in memory, so what enters an expert's down projection is never
seen by a hook; it is computed from the tokens routed to it, one expert at a time, when a pass asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from compressor_calibration.stats import KVStats, SiteStats, StatNeeds
from torch import Tensor, nn

from compressor.ir.layout import Linear, weight_name
from compressor.runner.attention_call import AttentionCall, AttentionHook

if TYPE_CHECKING:
    from compressor.runner.block_runner import Block, Observation


class Observer:
    """Hooks on one block for the length of a `with`."""

    def __init__(self, block: Block, *, needs: Mapping[str, StatNeeds]) -> None:
        self.block = block
        self.needs = needs
        self.stats: dict[str, SiteStats] = {}
        self.experts: _Experts | None = None
        self.calls: dict[str, _Calls] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Observer:
        unit = self.block.unit
        for site, needs in self.needs.items():
            linears = unit.site_linears(site)
            plain = [linear for linear in linears if linear.expert is None]
            first = plain[0] if plain else linears[0]
            if first.role == "expert.down":
                self._watch_experts(first)
                continue
            self.stats[site] = SiteStats(first.in_features, needs, device=self.block.runner.device)
            self._hook(self.block.module(first), _Feed(self.stats[site]))
            if needs.keep_inputs:
                self._watch_calls(site, linears, needs.keep_inputs)
        return self

    def stop_after_last(self) -> None:
        """End each forward pass at the input of the block's last linear, if that is watched."""
        last = self.block.unit.linears[-1]
        if last.site in self.needs:
            self._hook(self.block.module(last), _stop)

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def finish(self) -> Observation:
        """What was seen. Expert statistics stay computable while the block is in memory."""
        from compressor.runner.block_runner import Observation

        self._hooks.close()
        for stats in self.stats.values():
            stats.all_reduce()
        sites = [site for site in self.needs if site not in self.stats]
        lazy = _LazyStats(ready=self.stats, experts=self.experts, sites=sites, needs=self.needs)
        return Observation(stats=lazy, module_loss=self.module_loss)

    @torch.no_grad()
    def module_loss(self, site: str, weights: Mapping[str, Tensor]) -> float:
        """Mean squared change of the output of a site's module over the kept inputs, where the
        weights [out, in] of the named linears are replaced."""
        calls = self.calls[site]
        if calls.original is None:
            calls.original = calls.run()
        block = self.block
        replaced = {weight_name(name): value for name, value in weights.items()}
        block.load({**block.tensors, **replaced})
        try:
            changed = calls.run()
        finally:
            block.load(block.tensors)
        total = sum(
            (a.float() - b.float()).square().sum(dtype=torch.float64)
            for a, b in zip(calls.original, changed, strict=True)
        )
        return float(total) / sum(a.numel() for a in calls.original)

    def _hook(self, module: nn.Module, hook: Any) -> None:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._hooks.callback(handle.remove)

    def _watch_experts(self, linear: Linear) -> None:
        if self.experts is None:
            module = self.block.module(linear)
            self.experts = _Experts(module, device=self.block.runner.device)
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
        self.calls[site] = _Calls(module, tokens)
        self._hook(module, self.calls[site])


def watch_kv(stats: KVStats) -> AttentionHook:
    """An attention hook that adds a block's keys, values and queries to `stats`, keeps of its calls
    as many tokens as are wanted, and attends as before."""

    def attend(call: AttentionCall) -> Tensor:
        stats.update(call.key, call.value, call.query)
        if stats.missing > 0:
            rows = -(-stats.missing // call.key.shape[2])
            few = (x[:rows].detach().clone() for x in (call.query, call.key, call.value))
            query, key, value = few
            stats.calls.append(replace(call, query=query, key=key, value=value, hidden=None))
            stats.missing -= key.shape[0] * key.shape[2]
        return call.plain(call.query, call.key, call.value)

    return attend


class Seen(Exception):
    """Ends a forward pass of which everything wanted has been seen."""


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise Seen


class _Feed:
    """A hook that adds a module's input to statistics."""

    def __init__(self, stats: SiteStats) -> None:
        self.stats = stats

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stats.update(args[0] if args else next(iter(kwargs.values())))


class _Calls:
    """A hook that keeps a module's calls until enough tokens are kept, and repeats them."""

    def __init__(self, module: nn.Module, tokens: int) -> None:
        self.module = module
        self.missing = tokens
        self.kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.original: list[Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.missing > 0:
            self.kept.append((args, dict(kwargs)))
            hidden = args[0] if args else kwargs["hidden_states"]
            self.missing -= hidden.numel() // hidden.shape[-1]

    def run(self) -> list[Tensor]:
        out = [self.module(*args, **kwargs) for args, kwargs in self.kept]
        return [o[0] if isinstance(o, tuple) else o for o in out]


class _Experts:
    """A hook on stacked experts: which tokens went to which expert."""

    def __init__(self, module: nn.Module, *, device: torch.device) -> None:
        self.module: Any = module
        self.device = device
        self.hidden: list[Tensor] = []
        self.chosen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
        hidden = named["hidden_states"]
        self.hidden.append(hidden.reshape(-1, hidden.shape[-1]))
        self.chosen.append(named["top_k_index"].reshape(self.hidden[-1].shape[0], -1))

    @torch.no_grad()
    def down_inputs(self, expert: int) -> Iterator[Tensor]:
        """What enters an expert's down projection, batch by batch."""
        for hidden, chosen in zip(self.hidden, self.chosen, strict=True):
            mine = hidden[(chosen == expert).any(dim=1)]
            weight, bias = self.module.gate_up_proj[expert], None
            if getattr(self.module, "has_bias", False):
                bias = self.module.gate_up_proj_bias[expert]
            weight = weight.T if self.transposed else weight
            # The family's own gate: some clamp, and add one to what is gated.
            yield self.module._apply_gate(nn.functional.linear(mine, weight, bias))

    @property
    def transposed(self) -> bool:
        """Whether memory has the experts' weights as [experts, in, out]."""
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def channels(self) -> int:
        """Inputs of an expert's down projection."""
        return int(self.module.down_proj.shape[1 if self.transposed else 2])


class _LazyStats(Mapping[str, SiteStats]):
    """Statistics by site; those of an expert's output exist only while they are looked at."""

    def __init__(
        self,
        *,
        ready: Mapping[str, SiteStats],
        experts: _Experts | None,
        sites: Sequence[str],
        needs: Mapping[str, StatNeeds],
    ) -> None:
        self._ready = ready
        self._experts = experts
        self._sites = sites
        self._needs = needs
        self._last: tuple[str, SiteStats] | None = None

    def __getitem__(self, site: str) -> SiteStats:
        if site in self._ready:
            return self._ready[site]
        if site not in self._sites or self._experts is None:
            raise KeyError(site)
        if self._last is None or self._last[0] != site:
            self._last = None
            self._last = (site, self._compute(site))
        return self._last[1]

    def _compute(self, site: str) -> SiteStats:
        assert self._experts is not None
        expert = int(site.split(".")[1])
        stats = SiteStats(self._experts.channels, self._needs[site], device=self._experts.device)
        for inputs in self._experts.down_inputs(expert):
            stats.update(inputs)
        stats.all_reduce()
        return stats

    def __iter__(self) -> Iterator[str]:
        return iter([*self._ready, *self._sites])

    def __len__(self) -> int:
        return len(self._ready) + len(self._sites)
