"""Packed experts whose codes are made when they are read: those of a block are most of its weights,
and its files hold them in half the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.checkpoint.source import Source
from compressor.errors import under
from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.qtensor import QTensor
from compressor.ir.unit import Unit


@dataclass(frozen=True, slots=True)
class CodedLater:
    """A linear's weight.

    tensors  that hold it, by name local to the linear
    """

    source: Source
    linear: Linear
    tensors: Mapping[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.shape

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, device: torch.device) -> CodedLater:
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def decode(self) -> QTensor:
        """Its codes. Raises InputError where its format cannot read them."""
        spec = self.source.schemes.linears[self.linear.name].weight
        assert spec is not None
        with under(self.linear.name):
            return self.source.format.decode(self.tensors, spec)

    def dequantize(self) -> Tensor:
        return self.decode().dequantize()


def assembled_but_experts(
    source: Source, layout: UnitLayout, tensors: Mapping[str, Tensor]
) -> tuple[Unit, dict[str, CodedLater]]:
    """The unit that tensors as read stand for without its packed experts, and those by the names of
    their weights."""
    schemes, rest = source.schemes.linears, dict(tensors)
    later: dict[str, CodedLater] = {}
    for linear in layout.linears:
        if linear.expert is not None and schemes[linear.name].weight is not None:
            own = {leaf: rest.pop(f"{linear.name}.{leaf}") for leaf in source.stored(linear)}
            later[linear.weight_name] = CodedLater(source, linear, own)
    others = replace(
        layout,
        linears=tuple(x for x in layout.linears if x.weight_name not in later),
        tensors=tuple(name for name in layout.tensors if name not in later),
    )
    return replace(source.assemble(others, rest), layout=layout), later
