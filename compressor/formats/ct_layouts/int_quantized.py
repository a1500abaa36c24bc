"""compressed-tensors `int-quantized`: integer weights whose inputs are quantized too, one a byte.

weight             int8 [out, in], codes less 2^(bits−1)
weight_scale       [out, in/G], [out, 1] or [1]
weight_zero_point  int8, the shape of the scales, less 2^(bits−1). Absent where symmetric
input_scale        [1], only for static inputs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.base import TensorShape
from compressor.formats.ct_layouts.base import (
    arguments,
    refuse_reordering,
    strategy_of,
    whole_number,
)
from compressor.formats.ct_layouts.inputs import (
    encode_static,
    input_entry,
    read_input,
    read_static,
    static_layout,
)
from compressor.formats.packing.checks import (
    SCALE_DTYPES,
    check_int,
    int_reason,
    matrix_shape,
    take,
    take_scales,
)
from compressor.qtensor import QTensor, QuantSpec
from compressor.scheme import ActivationSpec, Scheme


class IntQuantized:
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
        if scheme.input.mode == "group" and shape[1] % (scheme.input.group_size or 1):
            return f"{shape[1]} inputs do not divide into groups of {scheme.input.group_size}"
        if not 1 <= scheme.weight.bits <= 8:
            return f"{scheme.weight.bits} bits are not 1 to 8"
        return int_reason(scheme.weight, shape)

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """The model's dtype."""
        return model_dtype

    def layout(
        self, spec: QuantSpec, shape: tuple[int, int], *, input: ActivationSpec | None
    ) -> dict[str, TensorShape]:
        """Tensors of one linear, as the module's docstring lists them."""
        stored = (1,) if spec.strategy == "tensor" else spec.scale_shape(*shape)
        names = {
            "weight": TensorShape(torch.int8, shape),
            "weight_scale": TensorShape(spec.scale_dtype, stored),
        }
        if not spec.symmetric:
            names["weight_zero_point"] = TensorShape(torch.int8, stored)
        return names | static_layout(input, spec)

    def encode(
        self, q: QTensor, *, input: ActivationSpec | None, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Centre codes and zero points; InputError where they break the spec."""
        check_int(q)
        stored = self.layout(q.spec, q.shape, input=None)["weight_scale"].shape
        tensors = {
            "weight": _centred(q.codes, q.spec),
            "weight_scale": q.scales.reshape(stored).contiguous(),
        }
        if q.zeros is not None:
            tensors["weight_zero_point"] = _centred(q.zeros, q.spec).reshape(stored)
        return tensors | encode_static(input, q.spec, input_scale)

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """`input_scale`, if inputs are static."""
        return read_static(tensors)

    def owns(self, tensors: Mapping[str, Any]) -> bool:
        """Known by an int8 weight."""
        return "weight" in tensors and tensors["weight"].dtype == torch.int8

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Read back; InputError names the tensor that does not fit."""
        shape = matrix_shape(tensors, "weight")
        if reason := int_reason(spec, shape):
            raise InputError(f"tensor 'weight': {reason}")
        names = self.layout(spec, shape, input=None)
        scales = take_scales(tensors, "weight_scale", spec=spec, shape=names["weight_scale"].shape)
        zeros = None
        if not spec.symmetric:
            stored = names["weight_zero_point"].shape
            zeros = take(tensors, "weight_zero_point", shape=stored, dtypes=(torch.int8,))
            zeros = _raised(zeros, spec, "weight_zero_point").reshape(spec.scale_shape(*shape))
        return QTensor(
            spec=spec,
            codes=_raised(
                take(tensors, "weight", shape=shape, dtypes=(torch.int8,)), spec, "weight"
            ),
            scales=scales.reshape(spec.scale_shape(*shape)),
            zeros=zeros,
        )

    def group(self, scheme: Scheme) -> dict[str, Any]:
        """QuantizationArgs of the weight and the input."""
        spec, input = scheme.weight, scheme.input
        assert spec is not None and input is not None
        weights = arguments(
            bits=spec.bits,
            type="int",
            symmetric=spec.symmetric,
            strategy=spec.strategy,
            group_size=spec.group_size if spec.strategy == "group" else None,
        )
        return {"weights": weights, "input_activations": input_entry(input)}

    def scheme(self, group: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> Scheme:
        """Specs of weight and input; the scale's dtype is the stored one."""
        args = group["weights"]
        refuse_reordering(args)
        strategy = strategy_of(args)
        if args.get("type", "int") != "int" or strategy == "block":
            raise InputError(f"weights {args.get('type')!r} by {strategy!r} in int-quantized")
        if group.get("input_activations") is None:
            raise InputError("int-quantized weights without input_activations are not supported")
        scale = tensors.get("weight_scale")
        if scale is None or scale.dtype not in SCALE_DTYPES:
            raise InputError("tensor 'weight_scale' is missing or has an unknown dtype")
        spec = QuantSpec(
            element="int",
            bits=whole_number(args, "num_bits", low=1, high=8),
            strategy=strategy,
            group_size=whole_number(args, "group_size", low=1, high=2**20)
            if strategy == "group"
            else None,
            zero="none" if args.get("symmetric", True) else "subtract",
            scale_dtype=scale.dtype,
        )
        return Scheme(weight=spec, input=read_input(group["input_activations"]))


def _centred(codes: Tensor, spec: QuantSpec) -> Tensor:
    return (codes.to(torch.int16) - (1 << (spec.bits - 1))).to(torch.int8)


def _raised(stored: Tensor, spec: QuantSpec, name: str) -> Tensor:
    codes = stored.to(torch.int16) + (1 << (spec.bits - 1))
    if bool(((codes < 0) | (codes >= 1 << spec.bits)).any()):
        raise InputError(f"tensor {name!r} holds values that {spec.bits} bits do not have")
    return codes.to(torch.uint8)
