"""What a model passes to each of its decoder layers, none of which runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class _Stop(Exception):
    """Ends a forward pass once the last decoder layer has been reached."""


class _Passed(Tensor):
    """Hidden states that a layer stands in for: some models take them for the layer's output, some
    for the first item of it."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))


def layer_inputs(
    model: nn.Module,
    layers: Sequence[nn.Module],
    inputs: Mapping[str, Tensor],
    arguments: dict[int, dict[str, Any]],
) -> Tensor:
    """What enters the first layer for inputs of the model; `arguments` gets what each layer is
    passed beside it."""
    found: list[Tensor] = []

    def stand_in(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                found.append(hidden_states)
            arguments[index] = {
                k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")
            }
            if index == len(layers) - 1:
                raise _Stop
            return hidden_states.as_subclass(_Passed)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = stand_in(index)
    try:
        model(**inputs, use_cache=False)
    except _Stop:
        pass
    finally:
        for layer in layers:
            del layer.forward
    return found[0]
