"""compressed-tensors `float-quantized` (FP8 weights and inputs) and `naive-quantized` (FP8 weights
alone), which differ in name only.

weight        float8_e4m3fn [out, in]
weight_scale  [1], [out, 1], [out, in/G] or [⌈out/rows⌉, ⌈in/columns⌉] for blocks; a multiplier
input_scale   [1], only for static inputs
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.compressed_tensors.layouts import inputs, weights
from compressor.formats.compressed_tensors.layouts.base import CTLayout
from compressor.formats.shared.checks import check_values, matrix_shape, take
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape

STORED = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class FloatQuantized(CTLayout):
    """FP8 weights, with or without quantized inputs as its name says."""

    format: str
    inputs: bool

    def holds(self, scheme: Scheme) -> bool:
        """E4M3 weights, and E4M3 inputs where this is the format for them."""
        weight = scheme.weight
        if weight is None or weight.element != "fp8_e4m3" or weight.microscaled:
            return False
        if not self.inputs:
            return scheme.input is None
        return scheme.input is not None and scheme.input.element == "fp8_e4m3"

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """A scale per tensor, channel, whole group or block, of which edge ones may be short."""
        assert scheme.weight is not None
        if scheme.weight.second != "none" or scheme.weight.zero != "none":
            return "it has one level of scales and no zero points"
        if scheme.input is not None and scheme.input.mode in ("local", "mx"):
            return "its inputs have a scale per token, tensor or group"
        size = scheme.weight.group_size if scheme.weight.strategy == "group" else None
        if shape[1] % (size or 1):
            return f"{shape[1]} inputs do not divide into groups of {size}"
        return inputs.uneven_inputs(scheme.input, shape)

    def layout(
        self, spec: QuantSpec, shape: tuple[int, int], *, input: ActivationSpec | None
    ) -> dict[str, TensorShape]:
        """Tensors of one linear, as the module's docstring lists them."""
        names = {
            "weight": TensorShape(STORED, shape),
            "weight_scale": weights.scale_layout(spec, shape),
        }
        return names | inputs.static_layout(input, spec)

    def encode(
        self, q: QTensor, *, input: ActivationSpec | None, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """The codes as they are; InputError where they break the spec."""
        check_values(q)
        tensors = {
            "weight": q.codes.contiguous().view(STORED),
            "weight_scale": weights.encode_scales(q),
        }
        return tensors | inputs.encode_static(input, q.spec, input_scale)

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """`input_scale`, if inputs are static."""
        return inputs.read_static(tensors)

    def owns(self, tensors: Mapping[str, Any]) -> bool:
        """Known by a float8 weight."""
        return "weight" in tensors and tensors["weight"].dtype == STORED

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Read back; InputError names the tensor that does not fit."""
        shape = matrix_shape(tensors, "weight")
        scales = weights.read_scales(tensors, spec, shape)
        codes = take(tensors, "weight", shape=shape, dtypes=(STORED,))
        codes = codes.contiguous().view(torch.uint8)
        return check_values(QTensor(spec=spec, codes=codes, scales=scales))

    def scheme(self, group: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> Scheme:
        """Specs of weight and input; the scale's dtype is the stored one."""
        args, beside = group["weights"], group.get("input_activations")
        strategy = weights.strategy_of(args)
        if (args.get("type"), args.get("num_bits")) != ("float", 8):
            raise InputError(f"weights {args.get('type')!r} of {args.get('num_bits')} bits")
        if (beside is not None) != self.inputs:
            raise InputError(f"input_activations {beside} in {self.format}")
        spec = QuantSpec(
            element="fp8_e4m3",
            bits=8,
            strategy=strategy,
            group_size=weights.group_size_of(args, strategy),
            block=_block(args) if strategy == "block" else None,
            scale_dtype=weights.stored_dtype(tensors),
        )
        return Scheme(weight=spec, input=None if beside is None else inputs.read_input(beside))


def _block(args: Mapping[str, Any]) -> tuple[int, int]:
    found = args.get("block_structure")
    if isinstance(found, str):  # older files write "128x128"
        found = [int(n) if n.isdigit() else 0 for n in found.split("x")]
    if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int for n in found):
        raise InputError(f"weights.block_structure is {found!r}, not two whole numbers")
    if min(found) < 1:
        raise InputError(f"weights.block_structure is {found!r}")
    return (found[0], found[1])
