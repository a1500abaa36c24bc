"""One unit of a model while it is worked on: its tensors, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.qtensor import QTensor


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of the model while passes work on it.

    tensors       checkpoint name → float tensor; linears that became QTensors are no longer in it
    quantized     module path of a linear → its QTensor
    extra         tensors a pass adds to the checkpoint, by their full name
    input_scales  module path of a linear → static scale of its input, float32 [1], a multiplier
    kv_scales     path of an attention module → static scales of keys after RoPE and of values,
                  float32 multipliers [1] or [kv_heads]
    """

    layout: UnitLayout
    tensors: Mapping[str, Tensor]
    quantized: Mapping[str, QTensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)
    kv_scales: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def weight(self, linear: Linear) -> Tensor:
        """The float weight [out, in] of a linear that is not quantized yet."""
        return self.tensors[f"{linear.name}.weight"]

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Unit:
        """This unit with some float tensors replaced."""
        return replace(self, tensors={**self.tensors, **changed})

    def with_extra(self, added: Mapping[str, Tensor]) -> Unit:
        """This unit with tensors added, by full name."""
        return replace(self, extra={**self.extra, **added})

    def with_quantized(self, linear: Linear, q: QTensor) -> Unit:
        """This unit with a linear's weight replaced by a QTensor."""
        name = f"{linear.name}.weight"
        rest = {key: value for key, value in self.tensors.items() if key != name}
        return replace(self, tensors=rest, quantized={**self.quantized, linear.name: q})

    def with_input_scale(self, linear: Linear, scale: Tensor) -> Unit:
        """This unit with the static scale of a linear's input set."""
        scale = scale.detach().to(torch.float32).reshape(1)
        return replace(self, input_scales={**self.input_scales, linear.name: scale})

    def dequantized(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Every original tensor in float, quantized ones as what they stand for, in `dtype`."""
        weights = {f"{name}.weight": q.dequantize(dtype) for name, q in self.quantized.items()}
        return {**self.tensors, **weights}
