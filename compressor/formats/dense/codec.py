"""Plain float weights: what a quantized model computes with, in a file that every loader reads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.base import Format, Headers, ModelSchemes, Shapes, Written
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape


class Dense(Format):
    """One `weight` [out, in] per linear, in the model's dtype. Codes and scales are not kept."""

    name = "dense"

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """The spec's own: no scale is stored, so none is rounded."""
        return spec.scale_dtype

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Any weight; quantized inputs have no place in a float checkpoint."""
        if scheme.input is not None:
            return "a dense checkpoint cannot say that inputs are quantized"
        return None

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """The weight alone."""
        return {"weight": TensorShape(dtype, shape)}

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """The weight, dequantized in float32, then rounded once to the checkpoint's dtype.

        Raises InputError where the result is not finite.
        """
        weight = q.dequantize().to(to.dtype)
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"the dequantized weight is not finite in {to.dtype}")
        return {"weight": weight}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Always refused: the codes are gone."""
        raise InputError("a dense checkpoint holds no codes", hint="quantize it with a recipe")

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """Nothing: a dense config.json has no `quantization_config`."""
        if schemes.kv is not None:
            raise InputError("a dense checkpoint cannot say that the KV cache is quantized")
        return {}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Only the absence of a `quantization_config`."""
        return not config

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Every linear in float."""
        return ModelSchemes(linears=dict.fromkeys(linears, Scheme()))


FORMAT = Dense()
