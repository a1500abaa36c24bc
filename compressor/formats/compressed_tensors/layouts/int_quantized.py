"""compressed-tensors `int-quantized`: integer weights whose inputs are quantized too, one a byte.

What `pack-quantized` holds as well is written packed, and read in both forms.

weight             int8 [out, in], codes less 2^(bits−1)
weight_scale       [out, in/G], [out, 1] or [1]
weight_zero_point  int8, the shape of the scales, less 2^(bits−1). Absent where symmetric
input_scale        [1], only for static inputs
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.compressed_tensors.layouts import inputs, weights
from compressor.formats.compressed_tensors.layouts.base import CTLayout
from compressor.formats.shared.checks import int_reason, matrix_shape, take
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape


class IntQuantized(CTLayout):
    """Integer weights beside int8 or fp8 inputs."""

    format = "int-quantized"

    def holds(self, scheme: Scheme) -> bool:
        """Integer weights whose inputs are quantized to eight bits."""
        weight, input = scheme.weight, scheme.input
        return (
            weight is not None
            and weight.element == "int"
            and input is not None
            and input.element in ("int8", "fp8_e4m3")
        )

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """1 to 8 bits with a scale per tensor, channel or whole group."""
        assert scheme.weight is not None and scheme.input is not None
        if scheme.input.mode == "mx":
            return "microscaled inputs go with microscaled weights"
        return inputs.uneven_inputs(scheme.input, shape) or weights.int_weight_reason(scheme, shape)

    def layout(
        self, spec: QuantSpec, shape: tuple[int, int], *, input: ActivationSpec | None
    ) -> dict[str, TensorShape]:
        """Tensors of one linear, as the module's docstring lists them."""
        names = {
            "weight": TensorShape(torch.int8, shape),
            "weight_scale": weights.scale_layout(spec, shape),
        }
        if not spec.symmetric:
            names["weight_zero_point"] = TensorShape(torch.int8, names["weight_scale"].shape)
        return names | inputs.static_layout(input, spec)

    def encode(
        self, q: QTensor, *, input: ActivationSpec | None, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Centre codes and zero points."""
        scales = weights.encode_scales(q)
        tensors = {"weight": _centred(q.codes, q.spec), "weight_scale": scales}
        if q.zeros is not None:
            tensors["weight_zero_point"] = _centred(q.zeros, q.spec).reshape(scales.shape)
        return tensors | inputs.encode_static(input, q.spec, input_scale)

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """`input_scale`, if inputs are static."""
        return inputs.read_static(tensors)

    def owns(self, tensors: Mapping[str, Any]) -> bool:
        """Known by an int8 weight."""
        return "weight" in tensors and tensors["weight"].dtype == torch.int8

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Read back; InputError names the tensor that does not fit."""
        shape = matrix_shape(tensors, "weight")
        if reason := int_reason(spec, shape):
            raise InputError(f"tensor 'weight': {reason}")
        scales = weights.read_scales(tensors, spec, shape)
        zeros = None
        if not spec.symmetric:
            zeros = _raised(
                tensors, "weight_zero_point", weights.scale_layout(spec, shape).shape, spec
            )
            zeros = zeros.reshape(scales.shape)
        codes = _raised(tensors, "weight", shape, spec)
        return QTensor(spec=spec, codes=codes, scales=scales, zeros=zeros)

    def scheme(self, group: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> Scheme:
        """Specs of weight and input; the scale's dtype is the stored one."""
        if group.get("input_activations") is None:
            raise InputError("int-quantized weights without input_activations are not supported")
        spec = weights.read_int_weight(group["weights"], tensors, format=self.format)
        return Scheme(weight=spec, input=inputs.read_input(group["input_activations"]))


def _centred(codes: Tensor, spec: QuantSpec) -> Tensor:
    return (codes.to(torch.int16) - (1 << (spec.bits - 1))).to(torch.int8)


def _raised(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], spec: QuantSpec
) -> Tensor:
    """The inverse of `_centred` for a stored tensor."""
    stored = take(tensors, name, shape=shape, dtypes=(torch.int8,))
    codes = stored.to(torch.int16) + (1 << (spec.bits - 1))
    if bool(((codes < 0) | (codes >= 1 << spec.bits)).any()):
        raise InputError(f"tensor {name!r} holds values that {spec.bits} bits do not have")
    return codes.to(torch.uint8)
