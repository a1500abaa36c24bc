"""A frozen model run twice side by side: with its own attention, and with gated heads.

DuoAttention (arXiv 2410.10819): in the gated stream each KV head gives (1 - a) · streaming + a ·
full, where `full` is the *full* stream's attention output of that layer, not recomputed. Gradients
reach the gates alone; each layer of the gated stream is recomputed in the backward pass.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.attention.rules.streaming import evaluated_by_text
from compressor.runner.attention_call import AttentionCall
from compressor.runner.source_model import SourceModel


@dataclass(frozen=True, slots=True)
class GatedPair:
    """Final hidden states [rows, length, hidden], after the final norm, of both streams."""

    full: Tensor
    gated: Tensor


class TwoStream:
    """A whole frozen model on its device, ready to run rows of tokens in two streams.

    sinks, window  of the streaming heads, all alike
    """

    def __init__(self, model: SourceModel, *, sinks: int, window: int) -> None:
        self.model = model
        self.sinks = sinks
        self.window = window
        self.layers: list[nn.Module] = []
        self._embedding: dict[str, Tensor] = {}
        self._mix = _Mix(sinks=sinks, window=window)
        self._norm: nn.Module | None = None
        self._hooked = False

    @contextmanager
    def loaded(self) -> Iterator[Self]:
        """All weights in memory, for the length of a `with`."""
        model = self.model
        units = model.layout.units
        with ExitStack() as stack:
            self._embedding = model.tensors(0)
            for number, unit in enumerate(units):
                if unit.kind == "block":
                    block = stack.enter_context(model.runner.loaded(unit, model.tensors(number)))
                    block.layer.requires_grad_(False)
                    self.layers.append(block.layer)
            # The norm lies in the model for as long as the head does; its weight is not asked.
            tensors = model.tensors(len(model.layout.blocks) + 1)
            stack.enter_context(model.runner.head(tensors, torch.empty(0)))
            self._norm = model.runner.model.get_submodule(model.runner.names.norm)
            try:
                yield self
            finally:
                self.layers.clear()
                self._embedding = {}

    def run(self, ids: Tensor, gates: Tensor) -> GatedPair:
        """Both streams for rows of ids [rows, length]; gates [layers, kv_heads] in [0, 1]."""
        if self._norm is None:
            raise RuntimeError("the model runs while it is loaded")
        model = self.model
        full = model.runner.embed(self._embedding, ids, batch=ids.shape[0]).to(model.dtype)
        gated = full
        with self._attention():
            for index, layer in enumerate(self.layers):
                arguments = model.runner.arguments(index, ids.shape[1])
                with torch.no_grad():
                    self._mix.listen()
                    full = _first(layer(full, **arguments))
                gated = checkpoint(
                    self._gated,
                    layer,
                    arguments,
                    gated,
                    gates[index],
                    self._mix.full,
                    use_reentrant=False,
                )
        return GatedPair(full=self._norm(full), gated=self._norm(gated))

    def _gated(
        self,
        layer: nn.Module,
        arguments: dict[str, Any],
        hidden: Tensor,
        gates: Tensor,
        full: Tensor,
    ) -> Tensor:
        # The backward pass comes here again, when other layers have used the hook.
        with self._attention():
            self._mix.mix(gates, full)
            return _first(layer(hidden, **arguments))

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """The hook in place, entered once in a forward pass: that costs as much as a layer."""
        if self._hooked:
            yield
            return
        with self.model.runner.attention(self._mix):
            self._hooked = True
            try:
                yield
            finally:
                self._hooked = False


class _Mix:
    """The attention hook of both streams: listens in one, mixes in the other."""

    def __init__(self, *, sinks: int, window: int) -> None:
        self.sinks = sinks
        self.window = window
        self.gates: Tensor | None = None
        self.full = torch.empty(0)

    def listen(self) -> None:
        """Attend as the model does, and keep the output as `full`."""
        self.gates, self.full = None, torch.empty(0)

    def mix(self, gates: Tensor, full: Tensor) -> None:
        """Attend as gated heads do, with the full stream's output [rows, length, heads, d]."""
        self.gates, self.full = gates, full

    def __call__(self, call: AttentionCall) -> Tensor:
        if self.gates is None:
            self.full = call.plain(call.query, call.key, call.value)
            return self.full
        near = evaluated_by_text(call, sinks=self.sinks, window=self.window)
        group = call.query.shape[1] // call.key.shape[1]
        gates = self.gates.to(near.dtype).repeat_interleave(group)[:, None]
        return (1 - gates) * near + gates * self.full


def _first(out: Any) -> Tensor:
    """A layer's hidden states: it returns a tensor in new transformers and a tuple in old ones."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found
