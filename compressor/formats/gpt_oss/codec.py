"""`quant_method: mxfp4`, as OpenAI publishes gpt-oss: experts alone, in MXFP4.

Each expert's weight is one slice of a stack, whose name its loaders look up:
X_blocks  uint8 [experts, out, in/32, 16], two codes a byte, the even input in the low half
X_scales  uint8 [experts, out, in/32], E8M0: w = code · 2^(byte-127)
The slices of a linear go by the names `blocks` and `scales` here; rows of gate_up_proj are gate and
up by turns, as in its floats.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.base import Format, Headers, ModelSchemes, Shapes, Written
from compressor.formats.shared.checks import check_values, describe
from compressor.formats.shared.e2m1 import pack_nibbles, unpack_nibbles
from compressor.formats.shared.mx import BLOCK, take_exponents
from compressor.formats.shared.whole_checkpoint import refuse_cache
from compressor.ir.layout import Linear
from compressor.ir.qtensor import E8M0, MXFP4, QTensor, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape

HALF = BLOCK // 2
"""Bytes of a block's codes."""


class GptOss(Format):
    """MXFP4 experts of gpt-oss, stacked under its own names."""

    name = "gpt-oss"
    scales_in = E8M0  # whose bytes are stored as uint8
    stacked = ("blocks", "scales")

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """MXFP4 weights in whole groups, whose inputs stay float."""
        if scheme.weight is None:
            return None if scheme.input is None else "inputs are quantized, the weight is not"
        if scheme.weight != MXFP4 or scheme.input is not None:
            return "it holds MXFP4 weights with float inputs"
        if shape[1] % BLOCK:
            return f"{shape[1]} inputs do not divide into groups of {BLOCK}"
        return None

    def refuses(self, model_type: str, linears: Iterable[tuple[Linear, Scheme]]) -> str | None:
        """All experts of gpt-oss, and nothing else."""
        if model_type != "gpt_oss":
            return f"its names are those of gpt_oss's experts, not of {model_type}"
        for linear, scheme in linears:
            if (scheme.weight is not None) != (linear.expert is not None):
                state = "stays float" if scheme.weight is None else "is quantized"
                return f"all experts are MXFP4 in it and nothing else is: {linear.name} {state}"
        return None

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """Blocks and scales of one linear."""
        rows, columns = shape
        blocks = TensorShape(torch.uint8, (rows, columns // BLOCK, HALF))
        scales = TensorShape(torch.uint8, (rows, columns // BLOCK))
        return {"blocks": blocks, "scales": scales}

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """Codes and bytes of scales; InputError where they break the spec."""
        check_values(q)
        blocks = pack_nibbles(q.codes.contiguous()).view(q.shape[0], -1, HALF)
        return {"blocks": blocks, "scales": q.scales.contiguous().view(torch.uint8)}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Unpack; InputError names the tensor that does not fit."""
        blocks = tensors.get("blocks")
        if blocks is None:
            raise InputError("tensor 'blocks' is missing")
        if blocks.dtype != torch.uint8 or blocks.dim() != 3 or blocks.shape[-1] != HALF:
            raise InputError(
                f"tensor 'blocks' is {describe(blocks)}, not uint8 [out, in/{BLOCK}, {HALF}]"
            )
        codes = unpack_nibbles(blocks.flatten(1))
        shape = (codes.shape[0], codes.shape[1])
        scales = take_exponents(tensors, "scales", spec=spec, shape=shape)
        return check_values(QTensor(spec=spec, codes=codes, scales=scales))

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """The entry; every linear that is left alone by exact name."""
        refuse_cache(schemes, name="gpt-oss's own format")
        if len(schemes.plain) == len(schemes.linears):
            return {}
        return {"quant_method": "mxfp4", "modules_to_not_convert": schemes.plain}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By `quant_method`."""
        return config.get("quant_method") == "mxfp4"

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Every linear that has blocks; its loaders look at nothing else."""
        return ModelSchemes(
            {
                module: Scheme(weight=MXFP4) if "blocks" in tensors else Scheme()
                for module, tensors in linears.items()
            }
        )


FORMAT = GptOss()
