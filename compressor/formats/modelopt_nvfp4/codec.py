"""NVIDIA ModelOpt's NVFP4 checkpoints.

weight          uint8 [out, in/2], two codes a byte, the even input in the low half
weight_scale    float8_e4m3fn [out, in/16], in plain rows
weight_scale_2  float32 scalar, a multiplier: w = code · weight_scale · weight_scale_2
input_scale     float32 scalar, also a multiplier; absent where inputs stay in float
The codes and block scales are those of compressed-tensors, which divides by the global scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.formats.base import Headers, ModelSchemes, Shapes, Written
from compressor.formats.compressed_tensors.layouts.inputs import positive_scale
from compressor.formats.shared.checks import weight_of
from compressor.formats.shared.e2m1 import (
    BLOCK,
    LOCAL,
    SCALE_DTYPE,
    check_nvfp4,
    nvfp4_reason,
    pack_nibbles,
    read_nvfp4,
    take_number,
)
from compressor.formats.shared.modelopt import (
    SCALAR,
    ModelOpt,
    config_entry,
    config_file,
    read_schemes,
)
from compressor.ir.qtensor import NVFP4, QTensor, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape

QUANTIZER = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
ALGORITHMS = {"NVFP4": Scheme(NVFP4, LOCAL), "W4A16_NVFP4": Scheme(NVFP4)}


class ModelOptNVFP4(ModelOpt):
    """NVFP4 weights, all with NVFP4 inputs or all with float ones."""

    name = "modelopt-nvfp4"
    scales_in = SCALE_DTYPE

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """NVFP4 of whole blocks."""
        if scheme.weight is None:
            return None if scheme.input is None else "inputs are quantized, the weight is not"
        return nvfp4_reason(scheme.weight, scheme.input, shape)

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """Tensors of one linear, as the module's docstring lists them."""
        names = {
            "weight": TensorShape(torch.uint8, (shape[0], shape[1] // 2)),
            "weight_scale": TensorShape(SCALE_DTYPE, weight_of(scheme).scale_shape(*shape)),
            "weight_scale_2": SCALAR,
        }
        return names if scheme.input is None else {**names, "input_scale": SCALAR}

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """Pack; InputError where the values break the spec."""
        check_nvfp4(q)
        assert q.second is not None
        tensors = {
            "weight": pack_nibbles(q.codes),
            "weight_scale": q.scales.contiguous(),
            "weight_scale_2": q.second.reshape(()),
        }
        if to.input is not None:
            tensors["input_scale"] = positive_scale(to.input_scale).to(torch.float32).reshape(())
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Unpack; InputError names the tensor that does not fit."""
        second = take_number(tensors, "weight_scale_2", shape=())
        return read_nvfp4(tensors, spec, packed="weight", second=second)

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """`input_scale`, if inputs are quantized."""
        return take_number(tensors, "input_scale", shape=()) if "input_scale" in tensors else None

    def files(self, schemes: ModelSchemes) -> dict[str, Any]:
        """hf_quant_config.json."""
        algorithm = self._algorithm(schemes)
        return {} if algorithm is None else config_file(schemes, algorithm, group_size=BLOCK)

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """The entry as ModelOpt writes it; empty where nothing is quantized."""
        algorithm = self._algorithm(schemes)
        if algorithm is None:
            return {}
        group = {"weights": dict(QUANTIZER)}
        if ALGORITHMS[algorithm].input is not None:
            group["input_activations"] = dict(QUANTIZER)
        return config_entry(schemes, algorithm, group)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By `quant_method` and `quant_algo`."""
        return config.get("quant_method") == "modelopt" and config.get("quant_algo") in ALGORITHMS

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Every linear with a packed weight is quantized the one way the config says."""
        scheme = ALGORITHMS[config["quant_algo"]]
        return read_schemes(config, linears, scheme=scheme, stored=torch.uint8)

    def _algorithm(self, schemes: ModelSchemes) -> str | None:
        scheme = self.common_scheme(schemes)
        if scheme is None:
            return None
        return "W4A16_NVFP4" if scheme.input is None else "NVFP4"


FORMAT = ModelOptNVFP4()
