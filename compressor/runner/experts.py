"""Experts that memory keeps stacked in one module, one at a time, as their family computes them.

No hook sees what enters an expert's down projection. transformers' own kernels for stacks take the
module's gate (`_apply_gate`: some families clamp, or add one to what is gated) between the two
products, and what is needed of one expert is made of the same parts. A module that those kernels do
not know runs as it is, with one expert in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor.errors import InputError
from compressor.runner.expert_groups import ExpertGroups, with_experts

Entering = Callable[[int, str, Tensor], Tensor]
"""(expert, gate or up or down, input [tokens, channels]) → that input as the linear sees it."""


def as_it_is(expert: int, part: str, entering: Tensor) -> Tensor:
    """The input unchanged."""
    return entering


def experts_of(module: nn.Module, groups: ExpertGroups | None = None) -> Experts:
    """The experts of a block, of which some are in memory at a time where `groups` are given.
    Raises InputError for a module whose parts are not known."""
    kind = Experts if hasattr(module, "_apply_gate") else _WholeExperts
    return kind(module, groups)


def run_in_groups(
    layer: nn.Module,
    modules: Iterable[str],
    weights: Callable[[range], Mapping[str, Tensor]],
    *,
    count: int,
    size: int,
) -> dict[nn.Module, ExpertGroups]:
    """Have a layer's modules of experts run some experts at a time, by a `forward` of their own.

    modules  their paths;  weights  experts → their tensors, by name relative to the layer
    """
    found: dict[nn.Module, ExpertGroups] = {}
    for path in modules:
        module: Any = layer.get_submodule(path)

        def own(some: range, prefix: str = f"{path}.") -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in weights(some).items()}

        found[module] = ExpertGroups(module, own, experts=range(count), size=size)
        module.forward = experts_of(module, found[module]).in_groups()
    return found


def hold_some(
    layer: nn.Module, modules: Iterable[str], stacks: Mapping[str, Tensor], held: range
) -> dict[nn.Module, ExpertGroups]:
    """Have a layer's modules know some of their experts alone; called, they answer with zeros.

    modules  their paths;  stacks  of those experts, by name relative to the layer
    Raises InputError for a module whose experts cannot be apart.
    """
    found: dict[nn.Module, ExpertGroups] = {}
    for path in modules:
        module: Any = layer.get_submodule(path)
        if not divisible(module):
            raise InputError(
                f"{type(module).__name__} runs experts in a way that ranks cannot share",
                hint="one process, with --device-memory: they then wait in main memory",
            )

        def own(every: range, prefix: str = f"{path}.") -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in stacks.items() if n.startswith(prefix)}

        found[module] = ExpertGroups(module, own, experts=held, size=len(held))
        module.forward = _to_nobody
    return found


def _to_nobody(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An answer where only what enters modules is looked at."""
    return torch.zeros_like(hidden)


def divisible(module: nn.Module) -> bool:
    """Whether what a module's experts make of a token is added up as `Experts.in_groups` does it,
    so that several processes may each have some of them."""
    way = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return hasattr(module, "_apply_gate") and way == "grouped_mm"


class Experts:
    """The experts of a block; `experts_of` makes it.

    module  transformers' module of all of them
    groups  where their weights come from, if they are not in it
    """

    def __init__(self, module: nn.Module, groups: ExpertGroups | None = None) -> None:
        self.module: Any = module
        self.groups = groups
        self.first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        if lacking := [part for part in (self.first, "down_proj") if not hasattr(module, part)]:
            raise InputError(
                f"{type(module).__name__} keeps its experts in a form that is not known here: it "
                f"has no {lacking[0]}",
                hint="leave the experts' down projections and inputs as they are (`ignore`)",
            )

    def __len__(self) -> int:
        return int(getattr(self.module, self.first).shape[0])

    parts = 3
    """Tensors that `call` gives."""

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The arguments of a call that decide what each expert gets: tensors of two dimensions,
        the first of which grows with the tokens. They are arguments for the methods below."""
        return list(routing(args, kwargs))

    def joined(self, calls: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What `call` gives of several calls, as of one with all their tokens."""
        return [torch.cat(parts) for parts in zip(*calls, strict=True)]

    def share(self, call: Sequence[Tensor]) -> int:
        """How many tokens of what `call` gave an expert gets on average, or fewer."""
        return call[1].numel() // len(self)

    def routed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[int], Tensor]:
        """Expert → the tokens [n, hidden] that a call of the module sends to it."""
        hidden, chosen, _ = routing(args, kwargs)
        found: list[Tensor] = []

        def tokens(expert: int) -> Tensor:
            if not found:  # of all experts at once: each wait for the device holds it up
                sent = torch.zeros(
                    len(hidden), len(self) + 1, dtype=torch.bool, device=hidden.device
                )
                sent.scatter_(1, chosen.clamp(max=len(self)), True)
                sent = sent[:, :-1].T
                found.extend(torch.split(sent.nonzero()[:, 1], sent.sum(dim=1).tolist()))
            return hidden[found[expert]]

        return tokens

    def unrouted(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[int], Tensor]:
        """Expert → all tokens [n, hidden] of a call of the module, wherever it sends them."""
        hidden, _, _ = routing(args, kwargs)
        return lambda expert: hidden

    def counts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """How many tokens a call of the module sends to each expert, int64 [experts]."""
        _, chosen, _ = routing(args, kwargs)
        return torch.bincount(chosen.flatten(), minlength=len(self))[: len(self)]

    @torch.no_grad()
    def entering_down(self, expert: int, tokens: Tensor, enter: Entering = as_it_is) -> Tensor:
        """What an expert makes of tokens [n, hidden] before its down projection, [n, channels]."""
        up = enter(expert, "up", tokens)
        if self.first == "up_proj":
            inner: Tensor = self.module.act_fn(self._product(self.first, expert, up))
            return inner
        gate = enter(expert, "gate", tokens)
        both = self._product(self.first, expert, gate)
        if not _same(gate, up):
            rows = self._product(self.first, expert, up)
            half = both.shape[-1] // 2
            concatenated = getattr(self.module, "is_concatenated", True)
            of_up = slice(half, None) if concatenated else slice(1, None, 2)
            both[..., of_up] = rows[..., of_up]
        inner = self.module._apply_gate(both)
        return inner

    @torch.no_grad()
    def each_entering_down(
        self, experts: Sequence[int], tokens: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """`entering_down` of several experts, each of tokens of its own: gated together, since each
        kernel would be started once for each of them."""
        if len(experts) == 1:
            return [self.entering_down(experts[0], tokens[0])]
        made = [self._product(self.first, e, part) for e, part in zip(experts, tokens, strict=True)]
        gate = self.module.act_fn if self.first == "up_proj" else self.module._apply_gate
        return torch.split(gate(torch.cat(made)), [len(part) for part in made])

    @torch.no_grad()
    def output(self, expert: int, tokens: Tensor, enter: Entering = as_it_is) -> Tensor:
        """What an expert makes of tokens [n, hidden], before it is weighted by the router."""
        inner = self.entering_down(expert, tokens, enter)
        out = self._product("down_proj", expert, enter(expert, "down", inner))
        if getattr(self.module, "has_post_expert_norm", False):
            out = self.module.post_expert_norm(out)
        return out

    def forward(self, enter: Entering) -> Callable[..., Tensor]:
        """The module's forward, expert by expert, with `enter` before each product."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden, chosen, weights = routing(args, kwargs)
            out = torch.zeros_like(hidden)
            for expert in range(len(self)):
                token, place = torch.where(chosen == expert)
                if len(token):
                    made = self.output(expert, hidden[token], enter)
                    weighted = made * weights[token, place, None]
                    out.index_add_(0, token, weighted.to(out.dtype))
            return out

        return forward

    def in_groups(self) -> Callable[..., Tensor]:
        """The module's forward with one group of experts after the other, to the same bits: a token
        and one of its experts are a row, and rows are weighted and summed as the module does."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden, chosen, weights = routing(args, kwargs)
            of, count = chosen.flatten(), chosen.shape[1]
            made = torch.zeros(len(of), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
            assert self.groups is not None
            for some in self.groups:
                rows = ((of >= some.start) & (of < some.stop)).nonzero()[:, 0]
                if len(rows):
                    alone = torch.ones(len(rows), 1, dtype=hidden.dtype, device=hidden.device)
                    chosen_here = of[rows, None] - some.start
                    made[rows] = self._of_group(some, hidden[rows // count], chosen_here, alone)
            return added_up(made, chosen, weights)

        return forward

    def _of_group(self, some: range, *args: Tensor) -> Tensor:
        """What a module of some experts makes of a call."""
        return own_forward(self._holding(some.start)[0], *args)

    def _holding(self, expert: int) -> tuple[Any, int]:
        """A module that has an expert's weights, and its place there."""
        return (self.module, expert) if self.groups is None else self.groups.holding(expert)

    def _product(self, stack: str, expert: int, entering: Tensor) -> Tensor:
        module, place = self._holding(expert)
        weight, bias = getattr(module, stack)[place], None
        if getattr(self.module, "has_bias", False):
            bias = getattr(module, f"{stack}_bias")[place]
        if getattr(self.module, "is_transposed", False):
            weight = weight.T
        return nn.functional.linear(entering, weight, bias)


class _WholeExperts(Experts):
    """Experts of a module that takes as many tokens for each of them, zeros where they are not for
    it (Llama 4): [experts * tokens, hidden]."""

    parts = 1

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        return [self._apart(args, kwargs).flatten(0, 1)]

    def joined(self, calls: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        apart = [self._apart(call, {}) for call in calls]
        return [torch.cat(apart, dim=1).flatten(0, 1)]

    def share(self, call: Sequence[Tensor]) -> int:
        return len(call[0]) // len(self)

    def routed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[int], Tensor]:
        tokens = [part[part.any(dim=1)] for part in self._apart(args, kwargs)]
        return lambda expert: tokens[expert]

    def unrouted(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[int], Tensor]:
        # Inputs are weighted by the router, so each token comes as the expert that it is sent to
        # with the largest weight gets it.
        parts = self._apart(args, kwargs)
        strongest = parts.abs().amax(dim=2).argmax(dim=0)
        tokens = parts[strongest, torch.arange(parts.shape[1], device=parts.device)]
        return lambda expert: tokens

    def counts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        return self._apart(args, kwargs).any(dim=2).sum(dim=1)

    @torch.no_grad()
    def entering_down(self, expert: int, tokens: Tensor, enter: Entering = as_it_is) -> Tensor:
        found: list[Tensor] = []

        def catch(inner: Tensor) -> Tensor:
            found.append(inner)
            raise _Caught

        with suppress(_Caught):
            self._run(expert, tokens, enter, catch)
        return found[0].reshape(len(tokens), -1)

    def each_entering_down(
        self, experts: Sequence[int], tokens: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return [self.entering_down(e, part) for e, part in zip(experts, tokens, strict=True)]

    @torch.no_grad()
    def output(self, expert: int, tokens: Tensor, enter: Entering = as_it_is) -> Tensor:
        return self._run(expert, tokens, enter, lambda inner: enter(expert, "down", inner))

    def forward(self, enter: Entering) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            parts = enumerate(self._apart(args, kwargs))
            return torch.cat([self.output(expert, part, enter) for expert, part in parts])

        return forward

    def in_groups(self) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            parts = self._apart(args, kwargs)
            assert self.groups is not None
            made = [
                self._of_group(some, parts[some.start : some.stop].flatten(0, 1))
                for some in self.groups
            ]
            return torch.cat([part.flatten(0, -2) for part in made])

        return forward

    def _apart(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Tokens of each expert, [experts, tokens, hidden]."""
        given = [*args, *kwargs.values()]
        if len(given) != 1:
            raise InputError(
                f"{type(self.module).__name__} is called in a way that is not known here",
                hint="leave the experts' down projections and inputs as they are (`ignore`)",
            )
        hidden: Tensor = given[0]
        return hidden.reshape(len(self), -1, hidden.shape[-1])

    def _run(
        self, expert: int, tokens: Tensor, enter: Entering, inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        gate, up = enter(expert, "gate", tokens), enter(expert, "up", tokens)
        if not _same(gate, up):
            raise InputError(
                f"{type(self.module).__name__} multiplies the gate's and up's weights with one "
                "input, and theirs are quantized in two ways"
            )
        module, place = self._holding(expert)
        stacks = {n: stack[place : place + 1] for n, stack in module.named_parameters()}
        alone: Any = with_experts(self.module, stacks)
        with _Before(alone.down_proj, inner):
            out = own_forward(alone, gate)
        return out.reshape(len(tokens), -1)


class _Before(TorchFunctionMode):
    """Changes what is multiplied with a weight, for the length of a `with`."""

    def __init__(self, weight: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.change = weight, change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if len(args) > 1 and args[1] is self.weight:
            args = (self.change(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


class _Caught(Exception):
    """Ends a forward pass of which what was wanted has been seen."""


def own_forward(module: nn.Module, *args: Tensor) -> Tensor:
    """The module's own forward, without hooks."""
    out: Tensor = type(module).forward(module, *args)
    return out


def added_up(pairs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What pairs of a token and an expert made, [tokens * K, hidden], weighted and summed over the
    experts [tokens, K] of each token in their order, as transformers' modules do."""
    weighted = pairs * weights.reshape(-1, 1)
    return weighted.view(*chosen.shape, -1).sum(dim=1).to(pairs.dtype)


def _same(gate: Tensor, up: Tensor) -> bool:
    return gate is up or torch.equal(gate, up)


def routing(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a call of the module: tokens [n, hidden], their experts [n, k], and the experts' weights.

    Families name the three differently and give them in this order.
    """
    hidden, chosen, weights = [*args, *kwargs.values()][:3]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden, chosen.reshape(hidden.shape[0], -1), weights.reshape(hidden.shape[0], -1)
