"""Check of the kernel that multiplies by MXFP4 and MXFP8 weights, whose inputs are float or of the
same kind: rounded inputs are exact in bf16, as the weights are."""

from typing import Any

import torch
from torch import Tensor

from compressor.ir.scheme import Scheme
from compressor.verify.kernels.layer import KernelCheck, Layer, Multiply, Product, Tile, operands
from compressor.verify.kernels.low_bit import SUMS, product


class MX(KernelCheck):
    """Microscaling weights, alone or with inputs of their own kind."""

    name = "mx"

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        spec, input = scheme.weight, scheme.input
        return spec is not None and spec.microscaled and (input is None or input.mode == "mx")

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        from compressor_kernels.linear.mx import mx_matmul, mx_values, quantize_mx_inputs

        weight, input = _operands(layer, tile, device), layer.scheme.input

        def multiplied(x: Tensor) -> Tensor:
            if input is None:
                entered = x.to(torch.bfloat16)
            else:
                parts = quantize_mx_inputs(x, element=input.element)
                entered = mx_values(*parts, dtype=torch.bfloat16)
            return mx_matmul(entered, **weight, out_dtype=torch.float32)

        return multiplied

    def kernel(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        found = self.multiply(layer, tile, x.device)(x)
        plain = layer.scheme.input is None
        seen = x.to(torch.bfloat16).double() if plain else _rounded(layer, x)
        return product(found, seen, layer.dense(tile, x.device), SUMS)

    def reference(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        from compressor_kernels.linear.mx import mx_matmul_ref

        seen = x.double() if layer.scheme.input is None else _rounded(layer, x)
        found = mx_matmul_ref(seen, **_operands(layer, tile, x.device))
        return product(found, seen, layer.dense(tile, x.device), 1e-11)


def _rounded(layer: Layer, x: Tensor) -> Tensor:
    """float64 inputs as the plain quantizer makes them."""
    from compressor_kernels.linear.mx import mx_values, quantize_mx_inputs_ref

    assert layer.scheme.input is not None
    parts = quantize_mx_inputs_ref(x, element=layer.scheme.input.element)
    return mx_values(*parts, dtype=torch.float64)


def _operands(layer: Layer, tile: Tile, device: torch.device) -> dict[str, Any]:
    from compressor_kernels.linear.mx import MXWeight

    stored = layer.tensors
    if "blocks" in stored:
        return operands(MXWeight(stored["blocks"].flatten(1), stored["scales"]), tile, device)
    codes = stored["weight_packed" if layer.q.spec.bits == 4 else "weight"]
    exponents = stored["weight_scale"].view(torch.uint8)
    return operands(MXWeight(codes, exponents), tile, device)
