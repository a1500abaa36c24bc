"""compressed-tensors `pack-quantized`: integer weights of 1 to 8 bits, packed along the inputs.

weight_packed      int32 [out, ⌈in·bits/32⌉], the row's codes as one bit stream
weight_scale       [out, in/G], [out, 1] or [1]
weight_shape       int64 [2]: (out, in)
weight_zero_point  int32 [⌈out·bits/32⌉, in/G], packed along the outputs; for one scale per tensor
                   int8 [1], centred. Absent where symmetric
Stored codes and packed zero points are unsigned, with the zero of a symmetric weight at 2^(bits−1).
Files of 3, 5, 6 or 7 bits from before version 0.18 have no element cross a word's end; they are
told by their width, which differs from 160 inputs (or outputs, for zero points) on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.compressed_tensors.layouts import inputs, weights
from compressor.formats.compressed_tensors.layouts.base import CTLayout
from compressor.formats.shared.checks import take
from compressor.formats.shared.words import pack_words, unpack_words, word_count
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape


class PackQuantized(CTLayout):
    """Integer weights alone, or beside inputs that are quantized dynamically by token or group."""

    format = "pack-quantized"

    def holds(self, scheme: Scheme) -> bool:
        """Integer weights whose inputs stay in float, or are quantized by token or group where
        vLLM reads the weight packed: below eight bits, in groups, or with zero points."""
        weight, input = scheme.weight, scheme.input
        if weight is None or weight.element != "int":
            return False
        if input is None:
            return True
        plain = weight.bits == 8 and weight.symmetric and weight.strategy != "group"
        dynamic = input.element in ("int8", "fp8_e4m3") and input.mode in ("token", "group")
        return dynamic and weight.strategy in ("channel", "group") and not plain

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """1 to 8 bits with a scale per tensor, channel or whole group."""
        assert scheme.weight is not None
        return inputs.uneven_inputs(scheme.input, shape) or weights.int_weight_reason(scheme, shape)

    def layout(
        self, spec: QuantSpec, shape: tuple[int, int], *, input: ActivationSpec | None
    ) -> dict[str, TensorShape]:
        """Tensors of one linear, as the module's docstring lists them."""
        rows, columns = shape
        groups = spec.scale_shape(rows, columns)
        per_tensor = spec.strategy == "tensor"
        names = {
            "weight_packed": TensorShape(torch.int32, (rows, word_count(columns, spec.bits))),
            "weight_scale": weights.scale_layout(spec, shape),
            "weight_shape": TensorShape(torch.int64, (2,)),
        }
        if not spec.symmetric:
            names["weight_zero_point"] = (
                TensorShape(torch.int8, (1,))
                if per_tensor
                else TensorShape(torch.int32, (word_count(rows, spec.bits), groups[1]))
            )
        return names

    def encode(
        self, q: QTensor, *, input: ActivationSpec | None, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Pack codes and zero points."""
        spec = q.spec
        per_tensor = spec.strategy == "tensor"
        tensors = {
            "weight_packed": pack_words(q.codes, spec.bits),
            "weight_scale": weights.encode_scales(q),
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if q.zeros is not None:
            tensors["weight_zero_point"] = (
                (q.zeros.to(torch.int16) - 2 ** (spec.bits - 1)).to(torch.int8).reshape(1)
                if per_tensor
                else pack_words(q.zeros.t(), spec.bits).t().contiguous()
            )
        return tensors

    def owns(self, tensors: Mapping[str, Any]) -> bool:
        """Known by its packed weight or the shape beside it, without NVFP4's global scale."""
        mine = "weight_packed" in tensors or "weight_shape" in tensors
        return mine and "weight_global_scale" not in tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Unpack; InputError names the tensor that does not fit."""
        rows, columns = _stored_shape(tensors)
        if reason := self.accepts(Scheme(weight=spec), (rows, columns)):
            raise InputError(f"tensor 'weight_shape': {reason}")
        scales = weights.read_scales(tensors, spec, (rows, columns))
        _check_order(tensors, spec, columns)
        codes = _unpack(tensors, "weight_packed", bits=spec.bits, shape=(rows, columns), along=1)
        return QTensor(spec=spec, codes=codes, scales=scales, zeros=_zeros(tensors, spec, scales))

    def scheme(self, group: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> Scheme:
        """Specs of weight and input; the scale's dtype is the stored one."""
        spec = weights.read_int_weight(group["weights"], tensors, format=self.format)
        args = group.get("input_activations")
        scheme = Scheme(weight=spec, input=None if args is None else inputs.read_input(args))
        if not self.holds(scheme):
            raise InputError("input_activations of this kind beside packed weights are not known")
        return scheme


def _stored_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    shape = take(tensors, "weight_shape", shape=(2,), dtypes=(torch.int64, torch.int32))
    rows, columns = (int(n) for n in shape.tolist())
    if rows < 1 or columns < 1:
        raise InputError(f"tensor 'weight_shape' says [{rows}, {columns}]")
    return rows, columns


def _zeros(tensors: Mapping[str, Tensor], spec: QuantSpec, scales: Tensor) -> Tensor | None:
    if spec.symmetric:
        return None
    if spec.strategy == "tensor":
        stored = take(tensors, "weight_zero_point", shape=(1,), dtypes=(torch.int8,))
        zero = stored.reshape(1, 1).to(torch.int16) + (1 << (spec.bits - 1))
        if not 0 <= int(zero) < 1 << spec.bits:
            raise InputError(f"tensor 'weight_zero_point' holds {int(stored)}")
        return zero.to(torch.uint8)
    rows, groups = scales.shape
    return _unpack(tensors, "weight_zero_point", bits=spec.bits, shape=(rows, groups), along=0)


def _unpack(
    tensors: Mapping[str, Tensor], name: str, *, bits: int, shape: tuple[int, int], along: int
) -> Tensor:
    """Codes uint8 of `shape` packed along one side, in today's packing or the one before."""
    count, other = shape[along], shape[1 - along]
    today, before = (word_count(count, bits, crossing=crossing) for crossing in (True, False))
    words = tensors.get(name)
    crossing = today == before or words is None or before not in words.shape[along : along + 1]
    length = today if crossing else before
    expected = (other, length) if along else (length, other)
    words = take(tensors, name, shape=expected, dtypes=(torch.int32,))
    if along:
        return unpack_words(words, bits, count, crossing=crossing)
    return unpack_words(words.t(), bits, count, crossing=crossing).t().contiguous()


def _check_order(tensors: Mapping[str, Tensor], spec: QuantSpec, columns: int) -> None:
    """Old files may name each input's group; only neighbours in order have a QTensor. A -1 says
    that they are in order."""
    order = tensors.get("weight_g_idx")
    if order is None or spec.group_size is None or bool((order == -1).any()):
        return
    expected = torch.arange(columns, device=order.device) // spec.group_size
    if tuple(order.shape) != (columns,) or not bool((order == expected).all()):
        raise InputError("tensor 'weight_g_idx' spreads groups over distant inputs")
