"""The arithmetic of number formats: from a float weight and a spec to a QTensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compressor.errors import InputError
from compressor.numerics.int_affine import fake_quantize_int, quantize_int
from compressor.qtensor import QTensor, QuantSpec

_QUANTIZE: dict[tuple[str, str], Callable[..., QTensor]] = {
    ("int", "none"): quantize_int,
}
_FAKE_QUANTIZE: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("int", "none"): fake_quantize_int,
}


def quantize(weight: Tensor, spec: QuantSpec, **options: Any) -> QTensor:
    """A weight [out, in] rounded to the nearest codes of its spec.

    The element and its second-level scale decide the arithmetic; options are that function's.
    Raises InputError for a spec that no arithmetic here makes.
    """
    function = _QUANTIZE.get((spec.element, spec.second))
    if function is None:
        raise InputError(
            f"no arithmetic for {spec.element} weights with second-level scale {spec.second!r}"
        )
    return function(weight, spec, **options)


def fake_quantize(weight: Tensor, spec: QuantSpec, **options: Any) -> Tensor:
    """`quantize(...).dequantize(weight.dtype)`, by a shorter way where the element has one."""
    function = _FAKE_QUANTIZE.get((spec.element, spec.second))
    if function is None:
        return quantize(weight, spec, **options).dequantize(weight.dtype)
    return function(weight, spec, **options)
