"""What a format is: pure functions between a QTensor and the tensors of one linear on disk.

A format never chooses codes or scales. Names are local to the linear ("weight_packed"); the caller
puts the module path in front.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.ir.tensor import TensorShape


@dataclass(frozen=True, slots=True)
class ModelSchemes:
    """All that a format's config entry is made from.

    linears  module path → scheme, for every linear the runtime sees, quantized or not
    kv       the KV cache's spec, or None
    named    groups list their linears one by one, also where a class of modules would do
    """

    linears: Mapping[str, Scheme]
    kv: KVSpec | None = None
    named: bool = False

    @property
    def plain(self) -> list[str]:
        """The linears whose weights are left alone."""
        return [module for module, scheme in self.linears.items() if scheme.weight is None]


class Format(Protocol):
    """One on-disk format. Each module in this folder holds one as `FORMAT`."""

    name: str
    """Recipe key, also the file name with - for _."""

    stores_divisors: bool
    """Whether it stores a tensor's second-level scale as its reciprocal."""

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """Dtype in which this format stores the scales of `spec`."""
        ...

    def model_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of unquantized tensors in the written checkpoint (AutoAWQ wants float16)."""
        ...

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None where the format can hold `scheme` for a weight [out, in], else the reason."""
        ...

    def may_lack(self, scheme: Scheme) -> str | None:
        """None where every weight of a scheme that it accepts has a form, else what may have
        none."""
        ...

    def lacks(self, q: QTensor) -> str | None:
        """None where this weight has a form, else what of its values has none."""
        ...

    def layout(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        *,
        model_dtype: torch.dtype,
        input: ActivationSpec | None = None,
    ) -> dict[str, TensorShape]:
        """Names, dtypes and shapes that `encode` will give for a weight [out, in]."""
        ...

    def stored(
        self,
        tensors: Mapping[str, TensorShape],
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        model_dtype: torch.dtype,
    ) -> dict[str, TensorShape]:
        """Those of a linear's tensors that hold its weight [out, in] and input scale, as they
        should be; `layout` where there is one way to write a scheme.

        tensors  all that a checkpoint has of the linear, by local name
        """
        ...

    def form(self, tensors: Mapping[str, TensorShape]) -> str:
        """Which of the format's sub-formats a quantized linear's tensors are in; "" where it has
        none."""
        ...

    def encode(
        self,
        q: QTensor,
        *,
        model_dtype: torch.dtype,
        input: ActivationSpec | None = None,
        input_scale: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The tensors on disk. Raises InputError where a value has no exact form.

        model_dtype  dtype of the written checkpoint's float tensors, as `model_dtype` gives it
        input        how the linear's input is quantized: the same int8 weight is packed where only
                     weights are quantized and stored as int8 where inputs are too
        input_scale  the multiplier [1] of an input whose mode is static or local, for which it has
                     to be given; rounded once to the dtype that is stored
        """
        ...

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The stored scale of a linear's input as a float32 multiplier [1], or None."""
        ...

    def kv_tensors(
        self,
        kv: KVSpec,
        attention: str,
        *,
        k_scale: Tensor,
        v_scale: Tensor,
        model_dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """The tensors that hold static scales of one layer's KV cache, by full name.

        attention  path of the attention module
        k_scale    multiplier of the keys after RoPE, [1] or [kv_heads]; likewise v_scale
        Raises InputError where the format has no place for them. Meta tensors give shapes.
        """
        ...

    def kv_scales(
        self, tensors: Mapping[str, Tensor], attention: str
    ) -> tuple[Tensor, Tensor] | None:
        """The inverse of `kv_tensors`: float32 scales of keys and values, or None."""
        ...

    def files(self, schemes: ModelSchemes) -> dict[str, Any]:
        """JSON files beside config.json that the format's readers want: name → content."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of `encode`."""
        ...

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """The `quantization_config` entry of config.json."""
        ...

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """True where a `quantization_config` entry is of this format."""
        ...

    def schemes(
        self, config: Mapping[str, Any], linears: Mapping[str, Mapping[str, TensorShape]]
    ) -> ModelSchemes:
        """The schemes a checkpoint declares.

        config   its `quantization_config`
        linears  module path → local tensor name → header entry, for every linear of the model
        Raises InputError for what is declared but not supported, with the key that says so.
        """
        ...


class AllValues:
    """Defaults of a format that has a form for every value of what it accepts, and one form."""

    def stored(
        self: Format,
        tensors: Mapping[str, TensorShape],
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        model_dtype: torch.dtype,
    ) -> dict[str, TensorShape]:
        """What `layout` says."""
        assert scheme.weight is not None
        return self.layout(scheme.weight, shape, model_dtype=model_dtype, input=scheme.input)

    def form(self, tensors: Mapping[str, TensorShape]) -> str:
        """None."""
        return ""

    def may_lack(self, scheme: Scheme) -> str | None:
        """None."""
        return None

    def lacks(self, q: QTensor) -> str | None:
        """None."""
        return None


class WeightsOnly(AllValues):
    """Defaults of a format that has no place for scales of inputs or of the KV cache."""

    name: str
    stores_divisors = False

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """None."""
        return None

    def kv_tensors(
        self,
        kv: KVSpec,
        attention: str,
        *,
        k_scale: Tensor,
        v_scale: Tensor,
        model_dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Always refused."""
        raise InputError(f"{self.name} has no place for scales of the KV cache")

    def kv_scales(
        self, tensors: Mapping[str, Tensor], attention: str
    ) -> tuple[Tensor, Tensor] | None:
        """None."""
        return None

    def files(self, schemes: ModelSchemes) -> dict[str, Any]:
        """None beside config.json."""
        return {}


def format_names() -> list[str]:
    """Names of all formats, from the package's folder itself."""
    folders = importlib.import_module("compressor.formats").__path__
    found = {path.parent.name for f in folders for path in Path(f).glob("*/codec.py")}
    return sorted(name.replace("_", "-") for name in found)


def get_format(name: str) -> Format:
    """The format called `name`; InputError names the known ones."""
    if name not in format_names():
        raise InputError(f"unknown format {name!r}", hint=f"one of: {', '.join(format_names())}")
    module = importlib.import_module(f"compressor.formats.{name.replace('-', '_')}.codec")
    found: Format = module.FORMAT
    return found
