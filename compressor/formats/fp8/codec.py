"""`quant_method: fp8`, as DeepSeek and Qwen publish it: FP8 weights in blocks, inputs quantized in
groups as the model runs.

weight            float8_e4m3fn [out, in]
weight_scale_inv  float32 [⌈out/128⌉, ⌈in/128⌉], a multiplier in spite of its name
Checkpoints of others are read as floats (`checkpoint.low_precision.fp8`), since much is published
under this method that has no such form; those that are written here say so in their config and are
read as codes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.base import Format, Headers, ModelSchemes, Shapes, Written
from compressor.formats.shared.checks import (
    check_values,
    matrix_shape,
    refuse_other,
    take,
    take_scales,
)
from compressor.formats.shared.whole_checkpoint import refuse_cache
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape

BLOCK = (128, 128)
SPEC = QuantSpec("fp8_e4m3", 8, "block", block=BLOCK, scale_dtype=torch.float32)
INPUT = ActivationSpec("fp8_e4m3", "group", BLOCK[1])
PRODUCER = {"name": "compressor"}
SCALES = "weight_scale_inv"


class FP8Blocks(Format):
    """E4M3 weights with a scale per 128 × 128 block, E4M3 inputs with one per 128 of a token."""

    name = "fp8"
    scales_in = torch.float32

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Blocks of 128 × 128, of which edge ones may be short, with inputs in whole groups."""
        if scheme.weight is None:
            return None if scheme.input is None else "inputs are quantized, the weight is not"
        if scheme.weight != SPEC or scheme.input != INPUT:
            return "it holds E4M3 weights in blocks of 128 x 128 with E4M3 inputs in groups of 128"
        if shape[1] % BLOCK[1]:
            return f"{shape[1]} inputs do not divide into groups of {BLOCK[1]}"
        return None

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """Tensors of one linear, as the module's docstring lists them."""
        return {
            "weight": TensorShape(torch.float8_e4m3fn, shape),
            SCALES: TensorShape(torch.float32, SPEC.scale_shape(*shape)),
        }

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """The codes as they are; InputError where they break the spec."""
        check_values(q)
        return {
            "weight": q.codes.contiguous().view(torch.float8_e4m3fn),
            SCALES: q.scales.contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Read back; InputError names the tensor that does not fit."""
        shape = matrix_shape(tensors, "weight")
        codes = take(tensors, "weight", shape=shape, dtypes=(torch.float8_e4m3fn,))
        scales = take_scales(tensors, SCALES, spec=spec, shape=spec.scale_shape(*shape))
        codes = codes.contiguous().view(torch.uint8)
        return check_values(QTensor(spec=spec, codes=codes, scales=scales))

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """The entry; every linear that is left alone by exact name."""
        refuse_cache(schemes, name="fp8")
        if len(schemes.plain) == len(schemes.linears):
            return {}
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(BLOCK),
            "modules_to_not_convert": schemes.plain,
            "producer": dict(PRODUCER),
        }

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By `quant_method`, and who wrote it."""
        return config.get("quant_method") == "fp8" and config.get("producer") == PRODUCER

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Every linear with an FP8 weight is in blocks. Raises InputError where the config says
        another thing than the tensors."""
        expected = {"weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
        refuse_other(config, expected, where="quantization_config")
        plain = config.get("modules_to_not_convert")
        if not isinstance(plain, list) or not all(isinstance(name, str) for name in plain):
            raise InputError("quantization_config.modules_to_not_convert is not a list of names")
        found = {}
        for module, tensors in linears.items():
            coded = "weight" in tensors and tensors["weight"].dtype == torch.float8_e4m3fn
            if tensors and coded == (module in plain):
                state = "quantized" if coded else "not quantized"
                raise InputError(f"{module} is {state}, modules_to_not_convert says otherwise")
            found[module] = Scheme(SPEC, INPUT) if coded else Scheme()
        return ModelSchemes(linears=found)


FORMAT = FP8Blocks()
