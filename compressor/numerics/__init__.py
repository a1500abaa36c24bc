"""The arithmetic of number formats: from a float weight and a spec to a QTensor."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.numerics.fp8 import fp8_codes, quantize_fp8
from compressor.numerics.int_affine import fake_quantize_int, int_codes, quantize_int
from compressor.numerics.mx import mx_codes, quantize_mx
from compressor.numerics.nvfp4 import (
    fake_quantize_nvfp4,
    nvfp4_codes,
    quantize_nvfp4,
    shared_absmax,
)
from compressor.numerics.progressive import (
    offset_codes,
    progressive_codes,
    quantize_offset,
    quantize_progressive,
)

_QUANTIZE: dict[tuple[str, str, str], Callable[..., QTensor]] = {
    ("int", "none", "none"): quantize_int,
    ("int", "none", "subtract"): quantize_int,
    ("int", "none", "offset"): quantize_offset,
    ("int", "channel", "subtract"): quantize_progressive,
    ("int", "channel", "offset"): quantize_progressive,
    ("fp4_e2m1", "tensor", "none"): quantize_nvfp4,
    ("fp8_e4m3", "none", "none"): quantize_fp8,
}
_FAKE_QUANTIZE: dict[tuple[str, str, str], Callable[..., Tensor]] = {
    ("int", "none", "none"): fake_quantize_int,
    ("int", "none", "subtract"): fake_quantize_int,
    ("fp4_e2m1", "tensor", "none"): fake_quantize_nvfp4,
}


def quantize(weight: Tensor, spec: QuantSpec, **options: Any) -> QTensor:
    """A weight [out, in] rounded to the nearest codes of its spec.

    The element, its second-level scale and the form of its zero decide the arithmetic; options are
    that function's.
    Raises InputError for a spec that no arithmetic here makes.
    """
    kind = (spec.element, spec.second, spec.zero)
    function = quantize_mx if spec.microscaled else _QUANTIZE.get(kind)
    if function is None:
        raise InputError(
            f"no arithmetic for {spec.element} weights with second-level scale {spec.second!r} "
            f"and zero points {spec.zero!r}"
        )
    return function(weight, spec, **options)


def fake_quantize(weight: Tensor, spec: QuantSpec, **options: Any) -> Tensor:
    """`quantize(...).dequantize(weight.dtype)`, by a shorter way where the element has one."""
    function = _FAKE_QUANTIZE.get((spec.element, spec.second, spec.zero))
    if function is None or spec.microscaled:
        return quantize(weight, spec, **options).dequantize(weight.dtype)
    return function(weight, spec, **options)


def shared_options(
    weights: Sequence[Tensor], specs: Sequence[QuantSpec], groups: Sequence[Hashable]
) -> list[dict[str, Any]]:
    """Options of `quantize` for weights that runtimes fuse: those of one group share the scale
    that their matrix has as a whole (NVFP4's global scale, FP8's scale per tensor).

    groups  equal for what is fused; None stands alone
    """
    found: list[dict[str, Any]] = []
    for weight, spec, group in zip(weights, specs, groups, strict=True):
        whole = spec.second == "tensor" or (spec.element, spec.strategy) == ("fp8_e4m3", "tensor")
        if not whole:
            found.append({})
            continue
        same = [w for w, g in zip(weights, groups, strict=True) if group is not None and g == group]
        found.append({"amax": shared_absmax(same or [weight])})
    return found


def nearest_codes(
    weight: Tensor,
    spec: QuantSpec,
    *,
    scales: Tensor,
    zeros: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """Codes uint8 of a weight on a grid that is already chosen.

    All tensors broadcast: a column [out] with the [out] scales and zeros of its group, say. The
    scales are those of a QTensor, so that `quantize(w).codes` are the nearest codes on its grid.
    """
    if spec.microscaled:
        return mx_codes(weight, scales, spec)
    if spec.element == "fp8_e4m3":
        return fp8_codes(weight, scales)
    if spec.element == "fp4_e2m1":
        assert second is not None
        return nvfp4_codes(weight, scales, second)
    if zeros is not None and second is not None:
        return progressive_codes(weight, scales, zeros, second, spec=spec)
    if zeros is not None and spec.zero == "offset":
        return offset_codes(weight, scales, zeros, spec=spec)
    return int_codes(weight, scales, zeros, spec=spec)
