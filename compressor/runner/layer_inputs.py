"""What a model passes to each of its decoder layers, none of which runs."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                found.append(hidden_states)
            names = list(inspect.signature(type(layers[index]).forward).parameters)[2:]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            arguments[index] = {
                k: v for k, v in given.items() if k not in ("past_key_values", "use_cache")
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


@contextmanager
def no_values(
    model: nn.Module, layers: Sequence[nn.Module], device: torch.device
) -> Iterator[None]:
    """Zeros, which take no memory, in place of weights outside the layers that are not there:
    nobody reads the hidden states that they make."""
    inside = {module for layer in layers for module in layer.modules()}
    lacking = [
        (module, name, parameter)
        for module in model.modules()
        if module not in inside
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in lacking:
        zeros = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
        setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in lacking:
            setattr(module, name, parameter)


def by_row(one: Mapping[str, Any], several: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a layer's arguments that grow with the rows and do not spread over them."""
    return tuple(
        name
        for name, value in one.items()
        if isinstance(value, Tensor)
        and value.dim()
        and value.shape[0] != 1
        and isinstance(several.get(name), Tensor)
        and several[name].shape[0] != value.shape[0]
    )
