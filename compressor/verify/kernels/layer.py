"""What the check of a kernel is given and what it gives: one packed linear, and its product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from compressor.ir.qtensor import QTensor
from compressor.ir.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Layer:
    """One packed linear.

    tensors  what the file holds, by local name
    codes    the same as a QTensor, or None for a delta's signs
    weight   float64 [out, in] as the second reader decoded it
    """

    name: str
    scheme: Scheme
    tensors: Mapping[str, Tensor]
    codes: QTensor | None
    weight: Tensor

    @property
    def q(self) -> QTensor:
        assert self.codes is not None
        return self.codes

    def dense(self, tile: Tile, device: torch.device) -> Tensor:
        """float64 weight of a tile."""
        return self.weight[tile.rows, tile.columns].to(device)

    def to(self, device: torch.device) -> Layer:
        """This layer on a device."""
        codes = None if self.codes is None else self.codes.to(device)
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, codes=codes, weight=self.weight.to(device))

    def laid_out(self, tensors: Mapping[str, Tensor]) -> Layer:
        """This layer with other tensors of the same codes and scales."""
        return replace(self, tensors={**self.tensors, **tensors})


@dataclass(frozen=True, slots=True)
class Tile:
    """Outputs and inputs of a layer that a product is limited to."""

    rows: slice
    columns: slice


EVERYTHING = Tile(rows=slice(None), columns=slice(None))

SUMS = 1e-5
"""Of the sum of magnitudes: what fp32 sums may lose."""


@dataclass(frozen=True, slots=True)
class Product:
    """What a kernel made of x, and what float64 makes of it, both [tokens, outputs].

    bound  how far the kernel's arithmetic may be off, elementwise
    """

    found: Tensor
    expected: Tensor
    bound: Tensor

    @classmethod
    def of(cls, found: Tensor, seen: Tensor, weight: Tensor, loss: float) -> Product:
        """Of float64 inputs and weight; a sum may be off by `loss` of its magnitudes."""
        bound = loss * (seen.abs() @ weight.abs().mT) + 1e-30
        return cls(found=found, expected=seen @ weight.mT, bound=bound)


Multiply = Callable[[Tensor], Tensor]
"""Inputs [tokens, columns] to outputs [tokens, rows] in float32."""


def operands(weight: Any, tile: Tile, device: torch.device) -> dict[str, Any]:
    """Tensors of a tile of one of the kernels' packed weights, by the names the kernel has."""
    part = weight.tile(tile.rows, tile.columns)
    tensors = {x.name: getattr(part, x.name) for x in fields(part)}
    return {n: t.contiguous().to(device) for n, t in tensors.items() if isinstance(t, Tensor)}


class KernelCheck:
    """How one kernel is checked."""

    name: str

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        """Whether this kernel multiplies by weights of this scheme and shape."""
        return False

    def prepared(self, layer: Layer) -> Layer:
        """The layer in the layout that the kernel reads, made once for all its products."""
        return layer

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        """The Triton kernel by a prepared layer's tile, rounding of inputs included, with all that
        does not depend on the inputs done."""
        raise NotImplementedError

    def multiply_ref(self, layer: Layer, tile: Tile, seen: Tensor) -> Tensor:
        """The plain reference's product with float64 inputs."""
        raise NotImplementedError

    def half(self, layer: Layer) -> torch.dtype:
        """The dtype that codes and inputs are multiplied in."""
        return torch.bfloat16

    def rounded(self, layer: Layer, x: Tensor) -> Tensor:
        """float64 inputs as the plain quantizer makes them, where a scheme has them rounded."""
        raise NotImplementedError

    def loss(self, layer: Layer, x: Tensor) -> float:
        """How much of the sum of magnitudes the kernel may be off by."""
        return SUMS

    def kernel(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        """The Triton kernel's product with inputs x [tokens, columns] float32 of a tile."""
        found = self.multiply(layer, tile, x.device)(x)
        plain = layer.scheme.input is None
        seen = x.to(self.half(layer)).double() if plain else self.rounded(layer, x)
        return Product.of(found, seen, layer.dense(tile, x.device), self.loss(layer, x))

    def reference(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        """The plain reference's product with inputs x of a tile of whole rows."""
        seen = x.double() if layer.scheme.input is None else self.rounded(layer, x)
        found = self.multiply_ref(layer, tile, seen)
        return Product.of(found, seen, layer.dense(tile, x.device), 1e-11)
