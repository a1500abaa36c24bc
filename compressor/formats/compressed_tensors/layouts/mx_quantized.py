"""compressed-tensors `mxfp4-pack-quantized` and `mxfp8-quantized`: OCP microscaling weights, alone
or with inputs of the same kind.

weight_packed  uint8 [out, in/2], E2M1, two codes a byte, the even input in the low half, or
weight         float8_e4m3fn [out, in]
weight_scale   uint8 [out, in/32], E8M0: w = code · 2^(byte-127). 255 is NaN

The config says `scale_dtype: torch.uint8`, without which compressed-tensors quantizes otherwise and
vLLM reads another format. Scales of inputs are made as the model runs; nothing of them is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.compressed_tensors.layouts.base import CTLayout
from compressor.formats.compressed_tensors.layouts.inputs import read_input
from compressor.formats.shared.checks import check_values, matrix_shape, refuse_other, take
from compressor.formats.shared.e2m1 import pack_nibbles, unpack_nibbles
from compressor.formats.shared.mx import BLOCK, INPUTS, take_exponents
from compressor.ir.qtensor import E8M0, QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape


@dataclass(frozen=True, slots=True)
class MXQuantized(CTLayout):
    """Weights of one microscaling spec, MXFP4 or MXFP8."""

    format: str
    spec: QuantSpec

    @property
    def weight(self) -> str:
        """The tensor of the codes."""
        return "weight_packed" if self.spec.bits == 4 else "weight"

    def holds(self, scheme: Scheme) -> bool:
        """Weights of this element with power-of-two scales, whatever the inputs."""
        weight = scheme.weight
        return weight is not None and weight.microscaled and weight.element == self.spec.element

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Whole groups of 32; inputs in float or of the same kind."""
        if scheme.weight != self.spec:
            return f"it has one power of two per {BLOCK} inputs"
        if shape[1] % BLOCK:
            return f"{shape[1]} inputs do not divide into groups of {BLOCK}"
        if scheme.input not in (None, INPUTS[self.spec.element]):
            return "inputs are in float, or of the same kind as the weight"
        return None

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """E8M0, whose bytes are stored as uint8."""
        return E8M0

    def layout(
        self, spec: QuantSpec, shape: tuple[int, int], *, input: ActivationSpec | None
    ) -> dict[str, TensorShape]:
        """Tensors of one linear, as the module's docstring lists them."""
        rows, columns = shape
        codes = TensorShape(torch.float8_e4m3fn, shape)
        if spec.bits == 4:
            codes = TensorShape(torch.uint8, (rows, columns // 2))
        return {
            self.weight: codes,
            "weight_scale": TensorShape(torch.uint8, spec.scale_shape(*shape)),
        }

    def encode(
        self, q: QTensor, *, input: ActivationSpec | None, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Codes and bytes of scales; InputError where they break the spec."""
        check_values(q)
        codes = q.codes.contiguous()
        packed = pack_nibbles(codes) if q.spec.bits == 4 else codes.view(torch.float8_e4m3fn)
        return {self.weight: packed, "weight_scale": q.scales.contiguous().view(torch.uint8)}

    def owns(self, tensors: Mapping[str, Any]) -> bool:
        """Known by the dtypes of codes and scales, where there is no global scale."""
        if self.weight not in tensors or "weight_global_scale" in tensors:
            return False
        if self.spec.bits == 4:
            return bool(tensors[self.weight].dtype == torch.uint8)
        scale = tensors.get("weight_scale")
        bytes = scale is not None and scale.dtype in (torch.uint8, E8M0)
        return bytes and bool(tensors[self.weight].dtype == torch.float8_e4m3fn)

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Unpack; InputError names the tensor that does not fit."""
        rows, columns = matrix_shape(tensors, self.weight)
        dtype = torch.uint8 if spec.bits == 4 else torch.float8_e4m3fn
        stored = take(tensors, self.weight, shape=(rows, columns), dtypes=(dtype,))
        codes = unpack_nibbles(stored) if spec.bits == 4 else stored.contiguous().view(torch.uint8)
        shape = (codes.shape[0], codes.shape[1])
        if reason := self.accepts(Scheme(weight=spec), shape):
            raise InputError(f"tensor {self.weight!r}: {reason}")
        scales = take_exponents(tensors, "weight_scale", spec=spec, shape=shape)
        return check_values(QTensor(spec=spec, codes=codes, scales=scales))

    def scheme(self, group: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> Scheme:
        """The spec; anything else that is declared is refused."""
        args, inputs = group["weights"], group.get("input_activations")
        wanted = {"type": "float", "num_bits": self.spec.bits, "group_size": BLOCK}
        refuse_other(args, {**wanted, "strategy": "group"}, where="weights")
        return Scheme(weight=self.spec, input=None if inputs is None else read_input(inputs))
