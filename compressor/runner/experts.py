"""Experts that memory keeps stacked in one module, one at a time, as their family computes them.

No hook sees what enters an expert's down projection. transformers' own kernels for stacks take the
module's gate (`_apply_gate`: some families clamp, or add one to what is gated) between the two
products, and what is needed of one expert is made of the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import InputError

Entering = Callable[[int, str, Tensor], Tensor]
"""(expert, gate or up or down, input [tokens, channels]) → that input as the linear sees it."""


def as_it_is(expert: int, part: str, entering: Tensor) -> Tensor:
    """The input unchanged."""
    return entering


class Experts:
    """The experts of a block.

    module  transformers' module of all of them
    Raises InputError for one whose parts are not known.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        parts = (self.first, "down_proj", "_apply_gate" if self._gated else "act_fn")
        if lacking := [part for part in parts if not hasattr(module, part)]:
            raise InputError(
                f"{type(module).__name__} keeps its experts in a form that is not known here: it "
                f"has no {lacking[0]}",
                hint="leave the experts' down projections and inputs as they are (`ignore`)",
            )

    def __len__(self) -> int:
        return int(getattr(self.module, self.first).shape[0])

    @torch.no_grad()
    def entering_down(self, expert: int, tokens: Tensor, enter: Entering = as_it_is) -> Tensor:
        """What an expert makes of tokens [n, hidden] before its down projection, [n, channels]."""
        up = enter(expert, "up", tokens)
        if not self._gated:
            inner: Tensor = self.module.act_fn(self._product(self.first, expert, up))
            return inner
        gate = enter(expert, "gate", tokens)
        both = self._product(self.first, expert, gate)
        if gate is not up and not torch.equal(gate, up):
            rows = self._product(self.first, expert, up)
            half = both.shape[-1] // 2
            of_up = slice(half, None) if self._concatenated else slice(1, None, 2)
            both[..., of_up] = rows[..., of_up]
        inner = self.module._apply_gate(both)
        return inner

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
            hidden, chosen, weights = routed(args, kwargs)
            out = torch.zeros_like(hidden)
            for expert in range(len(self)):
                token, place = torch.where(chosen == expert)
                if len(token):
                    made = self.output(expert, hidden[token], enter)
                    weighted = made * weights[token, place, None]
                    out.index_add_(0, token, weighted.to(out.dtype))
            return out

        return forward

    @property
    def _gated(self) -> bool:
        return self.first == "gate_up_proj"

    @property
    def _concatenated(self) -> bool:
        return bool(getattr(self.module, "is_concatenated", True))

    def _product(self, stack: str, expert: int, entering: Tensor) -> Tensor:
        weight, bias = getattr(self.module, stack)[expert], None
        if getattr(self.module, "has_bias", False):
            bias = getattr(self.module, f"{stack}_bias")[expert]
        if getattr(self.module, "is_transposed", False):
            weight = weight.T
        return nn.functional.linear(entering, weight, bias)


def routed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a call of the module: tokens [n, hidden], their experts [n, k], and the experts' weights.

    Families name the three differently and give them in this order.
    """
    hidden, chosen, weights = [*args, *kwargs.values()][:3]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden, chosen.reshape(hidden.shape[0], -1), weights.reshape(hidden.shape[0], -1)
