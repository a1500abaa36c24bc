"""Checks of the kernels whose inputs are quantized too, and of NVFP4 weights.

Inputs go through the activation quantizer's kernel; what is expected is the float64 product of
what its plain reference makes of them, so that a wrong code shows as a wrong product.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from compressor_kernels.inputs.activations import quantize_tokens, quantize_tokens_ref
from compressor_kernels.inputs.nvfp4_inputs import quantize_nvfp4_inputs, quantize_nvfp4_inputs_ref
from compressor_kernels.linear.nvfp4 import NVFP4Weight, nvfp4_matmul, nvfp4_matmul_ref
from compressor_kernels.linear.w4a8 import QServeWeight, w4a8, w4a8_ref
from compressor_kernels.linear.w8a8 import w8a8, w8a8_blocks, w8a8_blocks_ref, w8a8_ref
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.verify.kernels.layer import (
    SUMS,
    KernelCheck,
    Layer,
    Multiply,
    Product,
    Tile,
    operands,
)

DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0}
BLOCK = 128
Quantize = Callable[..., tuple[Tensor, Tensor]]
FP8_SUMS = 2.0**-10
"""`SUMS` of tensor cores, which keep 13 bits below the largest term of a sum of E4M3."""


class EightBitInputs(KernelCheck):
    """Inputs in 8 bits, where a scheme has them rounded."""

    def rounded(self, layer: Layer, x: Tensor) -> Tensor:
        input = input_of(layer.scheme)
        codes, scales = _input_codes(layer, x, quantize_tokens_ref)
        if input.mode == "group" and input.group_size is not None:
            scales = scales.repeat_interleave(input.group_size, dim=-1)
        return codes.double() * scales.double()


class W8A8(EightBitInputs):
    """int8 or E4M3 weights, a byte each, with inputs of the same kind: scales per tensor, channel
    (int8 with zero points, too), 128 inputs or 128 × 128 block; inputs per token, tensor (static or
    not) or 128 inputs."""

    name = "w8a8"

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        spec, input = scheme.weight, scheme.input
        if spec is None or input is None or input.element not in DTYPES:
            return False
        if spec.element != {"int8": "int", "fp8_e4m3": "fp8_e4m3"}[input.element]:
            return False
        if spec.second != "none" or spec.zero == "offset":
            return False
        if spec.zero == "subtract":  # int32 sums are corrected by a zero point for each output
            return spec.strategy in ("tensor", "channel") and input.mode != "group"
        if input.mode == "group":
            return _blocked(scheme) and input.group_size == BLOCK
        return spec.strategy in ("tensor", "channel") or _blocked(scheme)

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        by = w8a8_blocks if _blocked(layer.scheme) else w8a8
        return self._multiply(layer, tile, device, quantize_tokens, by)

    def loss(self, layer: Layer, x: Tensor) -> float:
        fp8 = input_of(layer.scheme).element == "fp8_e4m3"
        return FP8_SUMS if fp8 and x.is_cuda else SUMS

    def reference(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        by = w8a8_blocks_ref if _blocked(layer.scheme) else w8a8_ref
        found = self._multiply(layer, tile, x.device, quantize_tokens_ref, by)(x)
        return Product.of(found, self.rounded(layer, x), layer.dense(tile, x.device), SUMS)

    def _multiply(
        self,
        layer: Layer,
        tile: Tile,
        device: torch.device,
        quantize: Quantize,
        multiply: Callable[..., Tensor],
    ) -> Multiply:
        weight, scales = _bytes(layer.q, tile, device)
        if _blocked(layer.scheme):
            rows, fixed = "input_scales", {"weight_scales": scales}
        else:
            rows, fixed = "row_scales", {"column_scales": scales}
            if layer.q.zeros is not None:
                fixed["column_zeros"] = _column_zeros(layer.q, layer.q.zeros, tile).to(device)

        def multiplied(x: Tensor) -> Tensor:
            codes, by = _input_codes(layer, x, quantize)
            return multiply(codes, weight, **{rows: by}, **fixed, out_dtype=torch.float32)

        return multiplied


class NVFP4(KernelCheck):
    """NVFP4 weights, whose inputs are float, or NVFP4 with a calibrated or own global scale.

    Rounded inputs are exact in bf16 but for their global scale, which multiplies the product.
    """

    name = "nvfp4"

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        spec, input = scheme.weight, scheme.input
        if spec is None or spec.element != "fp4_e2m1" or spec.second != "tensor":
            return False
        return input is None or input.element == "fp4_e2m1"

    def prepared(self, layer: Layer) -> Layer:
        codes = layer.q.codes
        return layer.laid_out({"codes": codes[:, 0::2] | (codes[:, 1::2] << 4)})

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        weight = self._operands(layer, tile, device)

        def multiplied(x: Tensor) -> Tensor:
            if layer.scheme.input is None:
                return nvfp4_matmul(x.to(torch.bfloat16), **weight, out_dtype=torch.float32)
            units, second = _units(quantize_nvfp4_inputs(x, amax=_amax(layer, x)))
            units = units.to(torch.bfloat16)
            return nvfp4_matmul(units, **weight, out_dtype=torch.float32) * second

        return multiplied

    def multiply_ref(self, layer: Layer, tile: Tile, seen: Tensor) -> Tensor:
        return nvfp4_matmul_ref(seen, **self._operands(layer, tile, seen.device))

    def rounded(self, layer: Layer, x: Tensor) -> Tensor:
        units, second = _units(quantize_nvfp4_inputs_ref(x, amax=_amax(layer, x)))
        return units.double() * second.double()

    def _operands(self, layer: Layer, tile: Tile, device: torch.device) -> dict[str, Any]:
        q = layer.q
        assert q.second is not None
        weight = NVFP4Weight(layer.tensors["codes"], q.scales, q.second.reshape(1))
        return operands(weight, tile, device)


class W4A8(EightBitInputs):
    """QServe's tiles with int8 inputs per token."""

    name = "w4a8"

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        spec, input = scheme.weight, scheme.input
        if spec is None or input != ActivationSpec("int8", "token"):
            return False
        if (spec.element, spec.bits) != ("int", 4) or any(side % 32 for side in shape):
            return False
        if spec.strategy == "channel":
            return spec.zero == "offset" and spec.second == "none"
        size = spec.group_size or 0
        return spec.second == "channel" and (size in (32, 64) or (size > 0 and size % 128 == 0))

    def prepared(self, layer: Layer) -> Layer:
        if "qweight" in layer.tensors:
            return layer
        from compressor.formats.qserve.codec import FORMAT, INPUT

        return layer.laid_out(FORMAT.encode(layer.q, model_dtype=torch.float16, input=INPUT))

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        return self._multiply(layer, tile, device, quantize_tokens, w4a8)

    def reference(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        found = self._multiply(layer, tile, x.device, quantize_tokens_ref, w4a8_ref)(x)
        return Product.of(found, self.rounded(layer, x), layer.dense(tile, x.device), SUMS)

    def _multiply(
        self,
        layer: Layer,
        tile: Tile,
        device: torch.device,
        quantize: Quantize,
        multiply: Callable[..., Tensor],
    ) -> Multiply:
        tensors = {
            x.name: layer.tensors[x.name].flatten() if x.name[:2] == "s1" else layer.tensors[x.name]
            for x in fields(QServeWeight)
            if x.name in layer.tensors
        }
        weight = operands(QServeWeight(**tensors), tile, device)

        def multiplied(x: Tensor) -> Tensor:
            codes, scales = quantize(x, dtype=torch.int8)
            return multiply(codes, **weight, row_scales=scales, out_dtype=torch.float32)

        return multiplied


def _blocked(scheme: Scheme) -> bool:
    """Whether a scale belongs to 128 inputs of one output, or to a 128 × 128 block."""
    spec = scheme.weight
    assert spec is not None
    groups = spec.strategy == "group" and spec.group_size == BLOCK
    return groups or (spec.strategy == "block" and spec.block == (BLOCK, BLOCK))


def input_of(scheme: Scheme) -> ActivationSpec:
    assert scheme.input is not None
    return scheme.input


def _bytes(q: QTensor, tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes of a tile as the kernel reads them, and the scales that belong to it."""
    codes = q.codes[tile.rows, tile.columns]
    if q.spec.element == "int":
        codes = (codes.to(torch.int16) - (1 << (q.spec.bits - 1))).to(torch.int8)
    else:
        codes = codes.contiguous().view(torch.float8_e4m3fn)
    top, bottom, _ = tile.rows.indices(q.shape[0])
    left, right, _ = tile.columns.indices(q.shape[1])
    among = slice(left // BLOCK, -(-right // BLOCK))
    scales = {
        "tensor": q.scales,
        "channel": q.scales[tile.rows],
        "group": q.scales[tile.rows, among],
        "block": q.scales[top // BLOCK : -(-bottom // BLOCK), among],
    }[q.spec.strategy]
    return codes.contiguous().to(device), scales.contiguous().to(device)


def _column_zeros(q: QTensor, zeros: Tensor, tile: Tile) -> Tensor:
    """Zero points of a tile's outputs as they stand beside centred codes, int8."""
    zeros = zeros if q.spec.strategy == "tensor" else zeros[tile.rows]
    return (zeros.to(torch.int16) - (1 << (q.spec.bits - 1))).to(torch.int8)


def scale_of_inputs(layer: Layer, input: ActivationSpec, x: Tensor) -> Tensor | None:
    """The scale of all inputs [1], or None where each token or group has its own."""
    if input.mode == "static":
        return _stored(layer, "input_scale").to(x.device)
    if input.mode != "tensor":
        return None
    absmax = x.abs().amax().float().reshape(1)
    return absmax / torch.full_like(absmax, LARGEST[input.element])


def _amax(layer: Layer, x: Tensor) -> Tensor:
    """The absmax [1] that the global scale of NVFP4 inputs stands for."""
    if input_of(layer.scheme).mode == "tensor":
        return x.abs().amax().float().reshape(1)
    if "input_global_scale" in layer.tensors:
        scale = _stored(layer, "input_global_scale").reciprocal()
    else:
        scale = _stored(layer, "input_scale")
    return (scale * 2688.0).to(x.device)


def _stored(layer: Layer, name: str) -> Tensor:
    if name not in layer.tensors:
        raise InputError(f"the checkpoint has no {layer.name}.{name}")
    return layer.tensors[name].float().reshape(1)


def _input_codes(layer: Layer, x: Tensor, quantize: Quantize) -> tuple[Tensor, Tensor]:
    """8-bit codes of inputs and their scales, by `quantize_tokens` or its reference."""
    input = input_of(layer.scheme)
    return quantize(
        x,
        dtype=DTYPES[input.element],
        group_size=input.group_size if input.mode == "group" else None,
        scale=scale_of_inputs(layer, input, x),
    )


def _units(parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """NVFP4 inputs less their global scale, float32, and that scale."""
    codes, scales, second = parts
    return NVFP4Weight(codes, scales, torch.ones_like(second)).dequantize(torch.float32), second
