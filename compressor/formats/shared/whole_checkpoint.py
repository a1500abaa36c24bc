"""Formats with one way of quantizing for the whole checkpoint: which it is, and how a config writes
its group size."""

from collections.abc import Mapping
from typing import Any

from compressor.errors import InputError
from compressor.formats.base import ModelSchemes
from compressor.ir.qtensor import QuantSpec
from compressor.ir.scheme import KVSpec, Scheme


def common_scheme(
    schemes: ModelSchemes, *, name: str, kv: KVSpec, hint: str | None = None
) -> Scheme | None:
    """The one scheme of all quantized linears, or None where none is.

    kv    the only form that a quantized KV cache may have
    hint  what would help where linears differ
    Raises InputError where they do, where the KV cache has another form or is quantized alone.
    """
    if schemes.kv not in (None, kv):
        per = kv.per.replace("_", " and ")
        raise InputError(f"{name} has no form for a KV cache other than {kv.element} per {per}")
    found = {m: s for m, s in schemes.linears.items() if s.weight is not None}
    if not found:
        if schemes.kv is not None:
            raise InputError(f"{name} cannot quantize the KV cache alone")
        return None
    first, scheme = next(iter(found.items()))
    for module, other in found.items():
        if other != scheme:
            raise InputError(
                f"{name} has one way of quantizing, but {first} and {module} differ", hint=hint
            )
    return scheme


def refuse_cache(schemes: ModelSchemes, *, name: str) -> None:
    """Raises InputError for a quantized KV cache, of which a format has no word."""
    if schemes.kv is not None:
        raise InputError(
            f"{name} has no form for a quantized KV cache", hint="use the compressed-tensors format"
        )


def group_size(spec: QuantSpec) -> int:
    """Inputs per scale as these configs write it: −1 for a whole channel."""
    return spec.group_size if spec.strategy == "group" and spec.group_size else -1


def read_group_size(config: Mapping[str, Any]) -> int | None:
    """The inverse of `group_size`: None for a whole channel, InputError for what is neither."""
    size = config_number(config, "group_size")
    if size != -1 and size < 1:
        raise InputError(f"quantization_config.group_size is {size}")
    return None if size == -1 else size


def config_number(config: Mapping[str, Any], key: str) -> int:
    """An integer of a `quantization_config`, or InputError."""
    value = config.get(key)
    if type(value) is not int:
        raise InputError(f"quantization_config.{key} is {value!r}, not a whole number")
    return value
