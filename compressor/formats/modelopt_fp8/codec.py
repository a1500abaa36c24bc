"""NVIDIA ModelOpt's FP8 checkpoints: one static scale per weight and per input.

weight        float8_e4m3fn [out, in]
weight_scale  float32 scalar, a multiplier
input_scale   float32 scalar, a multiplier
transformers does not know this config: it loads the codes as weights without their scales.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.formats.base import Headers, ModelSchemes, Shapes, Written
from compressor.formats.compressed_tensors.layouts.inputs import positive_scale
from compressor.formats.shared.checks import check_values, matrix_shape, take
from compressor.formats.shared.e2m1 import take_number
from compressor.formats.shared.modelopt import (
    SCALAR,
    ModelOpt,
    config_entry,
    config_file,
    read_schemes,
)
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape

SPEC = QuantSpec(element="fp8_e4m3", bits=8, strategy="tensor", scale_dtype=torch.float32)
INPUT = ActivationSpec("fp8_e4m3", "static")
QUANTIZER = {"dynamic": False, "num_bits": 8, "type": "float"}


class ModelOptFP8(ModelOpt):
    """E4M3 weights and static E4M3 inputs, one scale each."""

    name = "modelopt-fp8"
    scales_in = torch.float32

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """E4M3 with one scale per tensor and static inputs."""
        if scheme.weight is None:
            return None if scheme.input is None else "inputs are quantized, the weight is not"
        if scheme.weight != SPEC:
            return "it holds E4M3 weights with one scale per tensor"
        if scheme.input != INPUT:
            return "its inputs are E4M3 with one static scale"
        return None

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """Tensors of one linear, as the module's docstring lists them."""
        return {
            "weight": TensorShape(torch.float8_e4m3fn, shape),
            "weight_scale": SCALAR,
            "input_scale": SCALAR,
        }

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """The codes as they are; InputError where they break the spec."""
        check_values(q)
        return {
            "weight": q.codes.contiguous().view(torch.float8_e4m3fn),
            "weight_scale": q.scales.reshape(()),
            "input_scale": positive_scale(to.input_scale).to(torch.float32).reshape(()),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Read back; InputError names the tensor that does not fit."""
        shape = matrix_shape(tensors, "weight")
        codes = take(tensors, "weight", shape=shape, dtypes=(torch.float8_e4m3fn,))
        scale = take_number(tensors, "weight_scale", shape=())
        codes = codes.contiguous().view(torch.uint8)
        return check_values(QTensor(spec=spec, codes=codes, scales=scale.reshape(1, 1)))

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """`input_scale`."""
        return take_number(tensors, "input_scale", shape=())

    def files(self, schemes: ModelSchemes) -> dict[str, Any]:
        """hf_quant_config.json."""
        return {} if self.common_scheme(schemes) is None else config_file(schemes, "FP8")

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """The entry as ModelOpt writes it; empty where nothing is quantized."""
        if self.common_scheme(schemes) is None:
            return {}
        group = {"weights": dict(QUANTIZER), "input_activations": dict(QUANTIZER)}
        return config_entry(schemes, "FP8", group)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By `quant_method` and `quant_algo`."""
        return config.get("quant_method") == "modelopt" and config.get("quant_algo") == "FP8"

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Every linear with an FP8 weight has static scales."""
        return read_schemes(config, linears, scheme=Scheme(SPEC, INPUT), stored=torch.float8_e4m3fn)


FORMAT = ModelOptFP8()
