"""Check of the kernel that multiplies by MXFP4 and MXFP8 weights, whose inputs are float or of the
same kind: rounded inputs are exact in bf16, as the weights are."""

from typing import Any

import torch
from compressor_kernels.linear.mx import (
    MXWeight,
    mx_matmul,
    mx_matmul_ref,
    mx_values,
    quantize_mx_inputs,
    quantize_mx_inputs_ref,
)
from torch import Tensor

from compressor.ir.scheme import Scheme
from compressor.verify.kernels.layer import KernelCheck, Layer, Multiply, Tile, operands


class MX(KernelCheck):
    """Microscaling weights, alone or with inputs of their own kind."""

    name = "mx"

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        spec, input = scheme.weight, scheme.input
        return spec is not None and spec.microscaled and (input is None or input.mode == "mx")

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        weight, input = _operands(layer, tile, device), layer.scheme.input

        def multiplied(x: Tensor) -> Tensor:
            if input is None:
                entered = x.to(torch.bfloat16)
            else:
                parts = quantize_mx_inputs(x, element=input.element)
                entered = mx_values(*parts, dtype=torch.bfloat16)
            return mx_matmul(entered, **weight, out_dtype=torch.float32)

        return multiplied

    def multiply_ref(self, layer: Layer, tile: Tile, seen: Tensor) -> Tensor:
        return mx_matmul_ref(seen, **_operands(layer, tile, seen.device))

    def rounded(self, layer: Layer, x: Tensor) -> Tensor:
        assert layer.scheme.input is not None
        parts = quantize_mx_inputs_ref(x, element=layer.scheme.input.element)
        return mx_values(*parts, dtype=torch.float64)


def _operands(layer: Layer, tile: Tile, device: torch.device) -> dict[str, Any]:
    stored = layer.tensors
    if "blocks" in stored:
        return operands(MXWeight(stored["blocks"].flatten(1), stored["scales"]), tile, device)
    codes = stored["weight_packed" if layer.q.spec.bits == 4 else "weight"]
    exponents = stored["weight_scale"].view(torch.uint8)
    return operands(MXWeight(codes, exponents), tile, device)
