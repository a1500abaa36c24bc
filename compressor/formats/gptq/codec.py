"""GPTQ's file format, version 1 (`checkpoint_format` "gptq"), which the most loaders read.

qweight  int32 [in·bits/32, out]: each output's codes as one bit stream down the rows
qzeros   int32 [in/G, out·bits/32]: zero points along the outputs; version 1 stores zero − 1
scales   float16 [in/G, out]
g_idx    int32 [in]: the group of each input, here always i // G
Version 1 has no form for a zero point of 0: an asymmetric weight that has one is refused, any other
is held. `gptq-v2` stores zero points as they are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor import __version__
from compressor.errors import InputError
from compressor.formats.base import Format, Headers, ModelSchemes, Shapes, Written
from compressor.formats.shared.checks import matrix_shape, take, weight_of
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
from compressor.formats.shared.words import WORD, pack_words, unpack_words
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape

BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GPTQ(Format):
    """One bit width and group size for the whole checkpoint, which is in float16.

    name    recipe key
    marker  `checkpoint_format` in the config
    shift   what is subtracted from a zero point before it is stored
    """

    name: str
    marker: str
    shift: int

    codes = ("qweight",)
    scales_in = torch.float16
    floats_in = torch.float16  # a loader that runs in another dtype rounds the scales to it

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """2, 3, 4 or 8 bits by group or channel, both sides filling whole words."""
        if reason := weight_reason(scheme, shape, bits=BITS):
            return reason
        bits = scheme.weight.bits if scheme.weight is not None else WORD
        for count, side in zip(shape, ("outputs", "inputs"), strict=True):
            if count * bits % WORD:
                return f"{count} {side} of {bits} bits do not fill whole 32-bit words"
        return None

    def may_lack(self, scheme: Scheme) -> str | None:
        """In version 1, a zero point of 0."""
        if self.shift and scheme.weight is not None and scheme.weight.zero == "subtract":
            return "version 1 has no form for a zero point of 0, which may come out; gptq-v2 has"
        return None

    def lacks(self, q: QTensor) -> str | None:
        """A zero point of 0 in version 1."""
        if self.shift and q.zeros is not None and bool((q.zeros < self.shift).any()):
            return "version 1 has no form for its zero points of 0; gptq-v2 has"
        return None

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """Tensors of one linear, as the module's docstring lists them."""
        spec, (rows, columns) = weight_of(scheme), shape
        groups = spec.scale_shape(rows, columns)[1]
        return {
            "qweight": TensorShape(torch.int32, (columns * spec.bits // WORD, rows)),
            "qzeros": TensorShape(torch.int32, (groups, rows * spec.bits // WORD)),
            "scales": TensorShape(torch.float16, (groups, rows)),
            "g_idx": TensorShape(torch.int32, (columns,)),
        }

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """Pack. Raises InputError where the spec does not fit, scales are not float16 or, in
        version 1, a zero point is 0; other asymmetric weights have a form there too."""
        zeros = stored_zeros(q)
        return {
            "qweight": pack_words(q.codes, q.spec.bits).t().contiguous(),
            "qzeros": pack_words((zeros - self.shift).t(), q.spec.bits),
            "scales": q.scales.t().contiguous(),
            "g_idx": _group_of_inputs(q.spec, q.shape[1], device=q.codes.device),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Unpack. Raises InputError for a `g_idx` in another order (desc_act), for a zero point
        that does not fit, and for a symmetric `spec` where a zero point is not at the centre."""
        words, rows = matrix_shape(tensors, "qweight")
        shape = (rows, words * WORD // spec.bits)
        packed, qzeros, scales = take_packed(self, tensors, spec, shape)
        if "g_idx" in tensors:
            order = take(tensors, "g_idx", shape=(shape[1],), dtypes=(torch.int32, torch.int64))
            if not torch.equal(
                order.to(torch.int32), _group_of_inputs(spec, shape[1], device=order.device)
            ):
                raise InputError(
                    "tensor 'g_idx' spreads groups over distant inputs (desc_act)",
                    hint="its codes have no group order; only g_idx[i] = i // group_size is read",
                )
        zeros = unpack_words(qzeros, spec.bits, shape[0])
        if self.shift and bool((zeros > 2**spec.bits - 1 - self.shift).any()):
            raise InputError("tensor 'qzeros' holds a zero point that readers disagree on")
        return with_zeros(
            spec,
            codes=unpack_words(packed.t(), spec.bits, shape[1]),
            scales=scales.t(),
            zeros=(zeros + self.shift).t(),
        )

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """The entry GPTQ loaders read; linears left alone, but lm_head, are `dynamic` exceptions.

        Raises InputError where linears differ in bits or group size.
        """
        spec = common_spec(schemes, name=self.name)
        if spec is None:
            return {}
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": spec.bits,
            "group_size": group_size(spec),
            "desc_act": False,
            "sym": spec.symmetric,
            "lm_head": schemes.linears.get("lm_head", Scheme()).weight is not None,
            "checkpoint_format": self.marker,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"compressor:{__version__}"]},
        }
        plain = [module for module in schemes.plain if module != "lm_head"]
        if plain:
            config["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in plain}
        return config

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By `quant_method` and `checkpoint_format`, whose default is version 1."""
        marker = config.get("checkpoint_format") or "gptq"
        return config.get("quant_method") == "gptq" and marker == self.marker

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Every linear with a `qweight` is quantized the one way the config says."""
        for pattern, override in (config.get("dynamic") or {}).items():
            if override:
                raise InputError(f"quantization_config.dynamic {pattern!r} is not supported")
        spec = read_spec(config, symmetric=config.get("sym", True) is True)
        if spec.bits not in BITS:
            raise InputError(f"quantization_config.bits is {spec.bits}, not one of {BITS}")
        return stored_schemes(spec, linears)


def _group_of_inputs(spec: QuantSpec, columns: int, *, device: torch.device) -> Tensor:
    inputs = torch.arange(columns, dtype=torch.int32, device=device)
    return inputs // (spec.group_size or columns)


FORMAT = GPTQ(name="gptq", marker="gptq", shift=1)
