"""AutoAWQ's GEMM format: asymmetric 4-bit weights, transposed, eight outputs to a word.

qweight  int32 [in, out/8]: the nibbles of word c hold the codes of outputs 8c + 0, 2, 4, 6, 1, 3,
         5, 7
qzeros   int32 [in/G, out/8], the same way, zero points as they are
scales   float16 [in/G, out]
A symmetric weight is held exactly, with every zero point 8.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.base import Format, Headers, ModelSchemes, Shapes, Written
from compressor.formats.shared.checks import matrix_shape, weight_of
from compressor.formats.shared.transposed import (
    common_spec,
    read_spec,
    stored_schemes,
    stored_zeros,
    take_packed,
    weight_reason,
    with_zeros,
)
from compressor.formats.shared.whole_checkpoint import group_size
from compressor.formats.shared.words import pack_words, unpack_words
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape

BITS = 4
PER_WORD = 8


class AutoAWQ(Format):
    """One group size for the whole checkpoint, which is in float16."""

    name = "autoawq"
    codes = ("qweight",)
    scales_in = torch.float16
    floats_in = torch.float16  # its kernels compute in nothing else

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """4-bit integers by group or channel, outputs a multiple of 8."""
        if reason := weight_reason(scheme, shape, bits=(BITS,)):
            return reason
        if scheme.weight is not None and shape[0] % PER_WORD:
            return f"{shape[0]} outputs are not a multiple of {PER_WORD}"
        return None

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """Tensors of one linear, as the module's docstring lists them."""
        spec, (rows, columns) = weight_of(scheme), shape
        groups = spec.scale_shape(rows, columns)[1]
        return {
            "qweight": TensorShape(torch.int32, (columns, rows // PER_WORD)),
            "qzeros": TensorShape(torch.int32, (groups, rows // PER_WORD)),
            "scales": TensorShape(torch.float16, (groups, rows)),
        }

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """Pack; InputError where the spec is not one of AutoAWQ's or scales are not float16."""
        zeros = stored_zeros(q)
        return {
            "qweight": _pack(q.codes.t()),
            "qzeros": _pack(zeros.t()),
            "scales": q.scales.t().contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Unpack; a symmetric `spec` is refused where a zero point is not 8."""
        columns, words = matrix_shape(tensors, "qweight")
        shape = (words * PER_WORD, columns)
        packed, qzeros, scales = take_packed(self, tensors, spec, shape)
        return with_zeros(
            spec, codes=_unpack(packed).t(), scales=scales.t(), zeros=_unpack(qzeros).t()
        )

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """The entry AutoAWQ writes; InputError where linears differ.

        Loaders match `modules_to_not_convert` as substrings, so a name that is part of a quantized
        linear's name is refused.
        """
        spec = common_spec(schemes, name=self.name)
        if spec is None:
            return {}
        plain = schemes.plain
        quantized = [module for module, s in schemes.linears.items() if s.weight is not None]
        for name in plain:
            for module in quantized:
                if name in module:
                    raise InputError(
                        f"autoawq: loaders that leave {name} alone would leave {module} alone too",
                        hint="they look for the name anywhere in another; use compressed-tensors",
                    )
        return {
            "quant_method": "awq",
            "bits": spec.bits,
            "group_size": group_size(spec),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": plain or None,
            # vLLM takes a head for one in float unless this is said.
            **({"lm_head": True} if "lm_head" in quantized else {}),
        }

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By `quant_method` and `version`, whose default is gemm."""
        version = str(config.get("version", "gemm")).lower()
        return config.get("quant_method") == "awq" and version == "gemm"

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Every linear with a `qweight` is quantized the one way the config says."""
        if config.get("zero_point", True) is not True:
            raise InputError("quantization_config.zero_point false is not supported")
        spec = read_spec(config, symmetric=False)
        if spec.bits != BITS:
            raise InputError(f"quantization_config.bits is {spec.bits}; GEMM files hold {BITS}")
        return stored_schemes(spec, linears)


def _pack(values: Tensor) -> Tensor:
    """uint8 [n, out] → int32 [n, out/8] in AutoAWQ's order."""
    pairs = values.reshape(values.shape[0], -1, PER_WORD // 2, 2)
    return pack_words(pairs.mT.flatten(1), BITS)


def _unpack(words: Tensor) -> Tensor:
    """The inverse of `_pack`."""
    count = words.shape[1] * PER_WORD
    halves = unpack_words(words, BITS, count).reshape(words.shape[0], -1, 2, PER_WORD // 2)
    return halves.mT.flatten(1)


FORMAT = AutoAWQ()
