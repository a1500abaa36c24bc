"""What a format is: pure functions between a QTensor and the tensors of one linear on disk.

A format never chooses codes or scales. Names are local to the linear ("weight_packed"); the caller
puts the module path in front.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError, nearest
from compressor.formats.shared.checks import Look, int_looks, require
from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.ir.tensor import TensorShape

Shapes = dict[str, TensorShape]
"""Local name → dtype and shape of a linear's tensors."""

Headers = Mapping[str, TensorShape]
"""The same, of a file."""


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


@dataclass(frozen=True, slots=True)
class Written:
    """What a weight is written with.

    dtype        of the written checkpoint's float tensors, as `model_dtype` gives it
    input        how the linear's input is quantized: the same int8 weight is packed where only
                 weights are quantized and stored as int8 where inputs are too
    input_scale  the multiplier [1] of an input whose mode is static or local, for which it has to
                 be given; rounded once to the dtype that is stored
    """

    dtype: torch.dtype
    input: ActivationSpec | None = None
    input_scale: Tensor | None = None


class Format(ABC):
    """One on-disk format. Each folder here holds one as `FORMAT` in its `codec.py`.

    What is not abstract is right for a format of weights alone that has one form for every value of
    what it accepts.
    """

    name: str
    """Recipe key, also the folder's name with - for _."""

    stores_divisors = False
    """Whether it stores a tensor's second-level scale as its reciprocal."""

    rows_apart = False
    """Whether each row of a weight, or whole words of rows, has rows of its own in the tensors on
    disk, so that weights may be packed one above the other."""

    stacked: tuple[str, ...] = ()
    """A linear's tensors, where those of experts lie in stacks of all, as floats do; else each
    expert has its own."""

    codes: tuple[str, ...] = ()
    """A linear's tensors that hold integer codes and nothing else: what `decode` finds out of a
    weight beside its codes, it finds out where these are shapes alone (meta tensors)."""

    kv_names: tuple[str, str] | None = None
    """Where an attention module keeps the static scales of its keys and values."""

    scales_in: torch.dtype | None = None
    """Dtype of stored scales, where it is always one."""

    floats_in: torch.dtype | None = None
    """Dtype of unquantized tensors, where it is always one (AutoAWQ wants float16)."""

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """Dtype in which this format stores the scales of `spec`."""
        return self.scales_in or model_dtype

    def model_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of unquantized tensors in the written checkpoint."""
        return self.floats_in or dtype

    @abstractmethod
    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None where the format can hold `scheme` for a weight [out, in], else the reason."""

    def refuses(self, model_type: str, linears: Iterable[tuple[Linear, Scheme]]) -> str | None:
        """None where the format can hold a model whose linears have schemes that it accepts, else
        the reason."""
        return None

    def may_lack(self, scheme: Scheme) -> str | None:
        """None where every weight of a scheme that it accepts has a form, else what may have
        none."""
        return None

    def lacks(self, q: QTensor) -> str | None:
        """None where this weight has a form, else what of its values has none."""
        return None

    @abstractmethod
    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """Names, dtypes and shapes of the tensors that `pack` gives for a weight [out, in]."""

    @abstractmethod
    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """The tensors on disk of a weight that is accepted. Raises InputError where a value has no
        exact form."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """The exact inverse of `encode`."""

    @abstractmethod
    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """The `quantization_config` entry of config.json."""

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """True where a `quantization_config` entry is of this format."""

    @abstractmethod
    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """The schemes a checkpoint declares.

        config   its `quantization_config`
        linears  module path → local tensor name → header entry, for every linear of the model
        Raises InputError for what is declared but not supported, with the key that says so.
        """

    def stored(
        self, tensors: Headers, scheme: Scheme, shape: tuple[int, int], *, model_dtype: torch.dtype
    ) -> Shapes:
        """Those of a linear's tensors that hold its weight [out, in] and input scale, as they
        should be; `shapes` where there is one way to write a scheme.

        tensors  all that a checkpoint has of the linear, by local name
        """
        return self.shapes(scheme, shape, model_dtype)

    def form(self, tensors: Headers) -> str:
        """Which of the format's sub-formats a quantized linear's tensors are in; "" where it has
        none."""
        return ""

    def files(self, schemes: ModelSchemes) -> dict[str, Any]:
        """JSON files beside config.json that the format's readers want: name → content."""
        return {}

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The stored scale of a linear's input as a float32 multiplier [1], or None."""
        return None

    def kv_tensor(self, kv: KVSpec, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """A static scale of a KV cache, [1] or [kv_heads], as it is stored. Raises InputError where
        the format has no place for it."""
        raise InputError(f"{self.name} has no place for scales of the KV cache")

    def layout(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        *,
        model_dtype: torch.dtype,
        input: ActivationSpec | None = None,
    ) -> Shapes:
        """Names, dtypes and shapes that `encode` will give for a weight [out, in]."""
        return self.shapes(Scheme(weight=spec, input=input), shape, model_dtype)

    def encode(
        self,
        q: QTensor,
        *,
        model_dtype: torch.dtype,
        input: ActivationSpec | None = None,
        input_scale: Tensor | None = None,
        looks: list[Look] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors on disk; arguments as in `Written`. Raises InputError where a value has no
        exact form.

        looks  takes what is to be asked of integers' values, if that is not asked here
        """
        refused = self.accepts(Scheme(weight=q.spec, input=input), q.shape) or self.lacks(q)
        if refused:
            raise InputError(f"{self.name}: {refused}")
        if (q.spec.element, q.spec.second) == ("int", "none") and q.spec.zero != "offset":
            asked = int_looks(q)
            if looks is None:
                require(asked)
            else:
                looks += asked
        return self.pack(q, Written(model_dtype, input, input_scale))

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
        scales = [self.kv_tensor(kv, scale, model_dtype) for scale in (k_scale, v_scale)]
        names = self.kv_names or ()
        return {f"{attention}.{name}": t for name, t in zip(names, scales, strict=True)}

    def kv_scales(
        self, tensors: Mapping[str, Tensor], attention: str
    ) -> tuple[Tensor, Tensor] | None:
        """The inverse of `kv_tensors`: float32 scales of keys and values, or None."""
        names = [f"{attention}.{name}" for name in self.kv_names or ()]
        if not any(name in tensors for name in names):
            return None
        for name in names:
            if name not in tensors:
                raise InputError(f"tensor {name!r} is missing")
        k_scale, v_scale = (tensors[name].to(torch.float32).reshape(-1) for name in names)
        return k_scale, v_scale


def format_names() -> list[str]:
    """Names of all formats, from the package's folder itself."""
    folders = importlib.import_module("compressor.formats").__path__
    found = {path.parent.name for f in folders for path in Path(f).glob("*/codec.py")}
    return sorted(name.replace("_", "-") for name in found)


def get_format(name: str) -> Format:
    """The format called `name`; InputError names the known ones."""
    if name not in format_names():
        raise InputError(f"unknown format {name!r}", hint=nearest(name, format_names()))
    module = importlib.import_module(f"compressor.formats.{name.replace('-', '_')}.codec")
    found: Format = module.FORMAT
    return found
