"""compressed-tensors `nvfp4-pack-quantized`: E2M1 weights, alone or with E2M1 inputs.

weight_packed        uint8 [out, in/2], two codes a byte, the even input in the low half
weight_scale         float8_e4m3fn [out, in/16], in plain rows
weight_global_scale  float32 [1], a divisor: w = code · weight_scale / weight_global_scale
input_global_scale   float32 [1], also a divisor; absent where inputs stay in float or their global
                     scale is dynamic, which transformers simulates with a global scale of 1

Four over Six is plain NVFP4 to every reader: it only chooses other scales and codes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.compressed_tensors.layouts.base import CTLayout
from compressor.formats.compressed_tensors.layouts.inputs import positive_scale, read_input
from compressor.formats.shared.checks import refuse_other
from compressor.formats.shared.e2m1 import (
    BLOCK,
    LOCAL,
    SCALE_DTYPE,
    check_nvfp4,
    divisor_of,
    nvfp4_reason,
    pack_nibbles,
    read_nvfp4,
    take_number,
)
from compressor.ir.qtensor import NVFP4, QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape


class NVFP4PackQuantized(CTLayout):
    """NVFP4 weights, whose inputs stay in float or are NVFP4 too."""

    format = "nvfp4-pack-quantized"

    def holds(self, scheme: Scheme) -> bool:
        """E2M1 weights with float or E2M1 inputs."""
        weight, input = scheme.weight, scheme.input
        mine = weight is not None and weight.element == "fp4_e2m1" and not weight.microscaled
        return mine and (input is None or input.element == "fp4_e2m1")

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Whole blocks of 16, and a calibrated or dynamic global scale of inputs."""
        assert scheme.weight is not None
        return nvfp4_reason(scheme.weight, scheme.input, shape, dynamic=True)

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """float8_e4m3fn."""
        return SCALE_DTYPE

    def layout(
        self, spec: QuantSpec, shape: tuple[int, int], *, input: ActivationSpec | None
    ) -> dict[str, TensorShape]:
        """Tensors of one linear, as the module's docstring lists them."""
        names = {
            "weight_packed": TensorShape(torch.uint8, (shape[0], shape[1] // 2)),
            "weight_scale": TensorShape(SCALE_DTYPE, spec.scale_shape(*shape)),
            "weight_global_scale": TensorShape(torch.float32, (1,)),
        }
        if input == LOCAL:
            names["input_global_scale"] = TensorShape(torch.float32, (1,))
        return names

    def encode(
        self, q: QTensor, *, input: ActivationSpec | None, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Pack; InputError where the values break the spec or the global scale, which is stored as
        its reciprocal, is the reciprocal of no float32."""
        check_nvfp4(q)
        assert q.second is not None
        divisor = divisor_of(q.second)
        if not torch.equal(divisor.reciprocal(), q.second):
            raise InputError(
                f"the global scale {float(q.second)!r} is the reciprocal of no float32",
                hint="re-lay the weight out first, which moves it to the next one",
            )
        tensors = {
            "weight_packed": pack_nibbles(q.codes),
            "weight_scale": q.scales.contiguous(),
            "weight_global_scale": divisor.reshape(1),
        }
        if input == LOCAL:
            scale = positive_scale(input_scale).to(torch.float32)
            tensors["input_global_scale"] = divisor_of(scale)
        return tensors

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The reciprocal of `input_global_scale`, if it is stored."""
        if "input_global_scale" not in tensors:
            return None
        return take_number(tensors, "input_global_scale", shape=(1,)).reciprocal()

    def owns(self, tensors: Mapping[str, Any]) -> bool:
        """Known by its global scale."""
        return "weight_global_scale" in tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Unpack; InputError names the tensor that does not fit."""
        divisor = take_number(tensors, "weight_global_scale", shape=(1,))
        return read_nvfp4(tensors, spec, packed="weight_packed", second=divisor.reciprocal())

    def scheme(self, group: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> Scheme:
        """NVFP4; anything else that is declared is refused."""
        args, inputs = group["weights"], group.get("input_activations")
        wanted = {"type": "float", "num_bits": 4, "group_size": BLOCK, "strategy": "tensor_group"}
        refuse_other(args, wanted, where="weights")
        return Scheme(weight=NVFP4, input=None if inputs is None else read_input(inputs))
