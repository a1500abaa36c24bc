"""One call of a block's attention, and what may stand in its place in an evaluation."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of a rotary embedding by position."""


class PlainAttention(Protocol):
    """A model's own attention under its own scaling and caps."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """[rows, length, heads, head_dim]; `mask` [rows or 1, heads or 1, length, keys] takes the
        place of the model's own where it is given."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a block's attention is asked, after the rotary embedding and before heads are repeated.

    layer    index of the block
    query    [rows, heads, length, head_dim]
    key      [rows, kv_heads, length, head_dim];  value  the same shape
    mask     additive or boolean mask [1 or rows, 1, length, length], or None for plain causal
             attention
    scaling  factor of the products of query and key
    plain    the model's own attention of (query, key, value) under the same mask, scaling and caps
    rotary   cosine and sine of the rotary embedding, [length, channels], or [rows, 1, length,
             channels] where positions differ by row; or None
    hidden   what enters the attention, [rows, length, hidden], or None where that is not known
    first_row  number of the first of these rows among all that are run
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    plain: PlainAttention
    rotary: Rotary | None = None
    hidden: Tensor | None = None
    first_row: int = 0


AttentionHook = Callable[[AttentionCall], Tensor]
"""Gives the attention's output [rows, length, heads, head_dim] for one call."""


class Hookable(Protocol):
    """What runs blocks whose attention is hooked."""

    model: Any
    layers: list[nn.Module]
    first_row: int

    def rotary(self, index: int, length: int) -> Rotary | None:
        """The tables of layer `index` for rows of `length` tokens."""


@contextmanager
def hooked(runner: Hookable, hook: AttentionHook) -> Iterator[None]:
    """Let `hook` attend in place of a model's own attention, for the length of a `with`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = runner.model.config
    usual = config._attn_implementation
    name = f"hooked-{id(runner)}"
    entered: dict[int, Tensor] = {}

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[id(module)] = args[0] if args else kwargs["hidden_states"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, own: Any, **options: Any
    ) -> tuple[Tensor, None]:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        forward = ALL_ATTENTION_FUNCTIONS.get_interface(usual, eager)

        def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            under = own if mask is None else mask
            result: Tensor = forward(module, query, key, value, under, **options)[0]
            return result

        call = AttentionCall(
            layer=int(module.layer_idx),
            query=query,
            key=key,
            value=value,
            mask=own,
            scaling=float(options["scaling"]),
            plain=plain,
            rotary=runner.rotary(int(module.layer_idx), query.shape[2]),
            hidden=entered.pop(id(module), None),
            first_row=runner.first_row,
        )
        return hook(call), None

    ALL_ATTENTION_FUNCTIONS[name] = attend
    config._attn_implementation = name
    modules = [m for layer in runner.layers for m in layer.modules() if hasattr(m, "layer_idx")]
    try:
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            yield
    finally:
        config._attn_implementation = usual
        del ALL_ATTENTION_FUNCTIONS[name]
