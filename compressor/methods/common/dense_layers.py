"""Layers that a method leaves attending to everything."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator

from compressor.errors import InputError
from compressor.ir.layout import ModelLayout


def _ascending(value: tuple[int, ...]) -> tuple[int, ...]:
    if list(value) != sorted(set(value)) or any(layer < 0 for layer in value):
        raise ValueError("layers are ascending numbers from 0")
    return value


Layers = Annotated[tuple[int, ...], AfterValidator(_ascending)]
"""Numbers of layers."""


def missing_layers(layers: tuple[int, ...], layout: ModelLayout) -> Iterator[InputError]:
    """Where the model has not so many, or no others."""
    if layers and layers[-1] >= len(layout.blocks):
        yield InputError(
            f"there is no layer {layers[-1]}, the model has {len(layout.blocks)}",
            hint="dense_layers counts from 0",
        )
    elif len(layers) == len(layout.blocks):
        yield InputError(
            "dense_layers names every layer: nothing would be decided",
            hint="dense_layers: [], or the pass left out",
        )
