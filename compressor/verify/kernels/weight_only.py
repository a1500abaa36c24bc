"""Check of the kernel that decodes integers of any width and E4M3 weights in registers.

It multiplies by what the faster kernels do not read: 8 bits and odd widths beside float inputs,
E4M3 weights alone, groups of any size. Where inputs are quantized too, and no kernel of bytes takes
the weight's groups, it is given their codes, which are exact in bf16.
"""

from typing import Any

import torch
from compressor_kernels.inputs.activations import quantize_tokens
from compressor_kernels.linear.weight_only import weight_only, weight_only_ref
from torch import Tensor

from compressor.formats.compressed_tensors.layouts.pack_quantized import PackQuantized
from compressor.formats.shared.words import WORD, pack_words, word_count
from compressor.ir.scheme import Scheme
from compressor.verify.kernels.layer import SUMS, Layer, Multiply, Tile
from compressor.verify.kernels.low_bit import DTYPES, EightBitInputs, input_of, scale_of_inputs


class WeightOnly(EightBitInputs):
    """Integers of 1 to 8 bits or E4M3 weights with one level of scales; inputs in float, or with a
    scale per token or tensor."""

    name = "weight_only"

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        spec, input = scheme.weight, scheme.input
        if spec is None or spec.second != "none" or spec.zero == "offset" or spec.microscaled:
            return False
        if spec.element == "fp4_e2m1" or (spec.element == "fp8_e4m3" and spec.zero != "none"):
            return False
        if spec.zero != "none" and spec.strategy == "block":
            return False
        return input is None or (input.element in DTYPES and input.mode != "group")

    def prepared(self, layer: Layer) -> Layer:
        spec, packed = layer.q.spec, layer.tensors.get("weight_packed")
        crossing = packed is not None and packed.shape[1] == word_count(layer.q.shape[1], spec.bits)
        if crossing or spec.element == "fp8_e4m3":
            return layer
        return layer.laid_out(PackQuantized().encode(layer.q, input=None, input_scale=None))

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        weight, half = self._operands(layer, tile, device), self.half(layer)

        def multiplied(x: Tensor) -> Tensor:
            if layer.scheme.input is None:
                return weight_only(x.to(half), **weight, out_dtype=torch.float32)
            input = input_of(layer.scheme)
            scale = scale_of_inputs(layer, input, x)
            entered, by = quantize_tokens(x, dtype=DTYPES[input.element], scale=scale)
            found = weight_only(entered.to(half), **weight, out_dtype=torch.float32)
            return found * by.reshape(-1, 1)

        return multiplied

    def half(self, layer: Layer) -> torch.dtype:
        plain = layer.scheme.input is None and layer.q.scales.dtype == torch.float16
        return torch.float16 if plain else torch.bfloat16

    def loss(self, layer: Layer, x: Tensor) -> float:
        spec = layer.q.spec
        rounded = spec.strategy not in ("tensor", "channel") and (
            (spec.block or (1, spec.group_size or x.shape[-1]))[1] < x.shape[-1]
        )
        return SUMS + (2 * torch.finfo(self.half(layer)).eps if rounded else 0)

    def multiply_ref(self, layer: Layer, tile: Tile, seen: Tensor) -> Tensor:
        return weight_only_ref(seen, **self._operands(layer, tile, seen.device))

    def _operands(self, layer: Layer, tile: Tile, device: torch.device) -> dict[str, Any]:
        """Codes, scales, zero points and what shares a scale, of a tile that starts at a whole
        scale and at a whole word of zero points."""
        spec, (outputs, inputs) = layer.q.spec, layer.q.shape
        top, bottom, _ = tile.rows.indices(outputs)
        left, right, _ = tile.columns.indices(inputs)
        zeros = None
        if spec.element == "fp8_e4m3":
            codes = layer.q.codes[top:bottom, left:right].contiguous().view(torch.float8_e4m3fn)
        else:
            tensors, packed = layer.tensors, layer.tensors["weight_packed"]
            first, after = divmod(left * spec.bits, WORD)
            last = first + word_count(right - left, spec.bits)
            codes = packed[top:bottom, first:last].contiguous()
            if after:  # the tile starts inside a word
                codes = pack_words(layer.q.codes[top:bottom, left:right], spec.bits)
            zeros = tensors.get("weight_zero_point")
        if spec.strategy in ("tensor", "channel"):
            scales = layer.q.scales if spec.strategy == "tensor" else layer.q.scales[top:bottom]
            rows, columns = (bottom - top if spec.strategy == "tensor" else 1), right - left
        else:
            rows, columns = spec.block or (1, spec.group_size or inputs)
            down = torch.arange(top, bottom) // rows
            if top % rows == 0:
                down = down[::rows]
            else:
                rows = 1
            scales = layer.q.scales[down.to(layer.q.scales.device)]
            scales = scales[:, left // columns : -(-right // columns)]
        if zeros is not None and zeros.dtype != torch.int8:
            words = slice(top * spec.bits // WORD, word_count(bottom, spec.bits))
            among = slice(left // columns, -(-right // columns))
            zeros = zeros[words, among] if spec.strategy == "group" else zeros[words]
        return {
            "codes": codes.to(device),
            "scales": scales.contiguous().to(device),
            "zeros": None if zeros is None else zeros.to(device).contiguous(),
            "bits": spec.bits,
            "block": (rows, columns),
        }
