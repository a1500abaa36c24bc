"""What AutoAWQ and GPTQ files share: [in, out] order, float16 scales, zero points always stored,
and one bit width and group size for the whole checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.base import Format, Headers, ModelSchemes
from compressor.formats.shared.checks import SCALE_DTYPES, int_reason, take, take_scales
from compressor.formats.shared.whole_checkpoint import config_number, group_size, read_group_size
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme


def weight_reason(scheme: Scheme, shape: tuple[int, int], *, bits: tuple[int, ...]) -> str | None:
    """Why a scheme is not weight-only integers by group or channel in one of `bits`, or None."""
    if scheme.input is not None:
        return "it cannot say that inputs are quantized"
    if scheme.weight is None:
        return None
    if reason := int_reason(scheme.weight, shape):
        return reason
    if scheme.weight.bits not in bits:
        return f"it holds {', '.join(str(b) for b in bits)} bits, not {scheme.weight.bits}"
    if scheme.weight.strategy == "tensor":
        return "it has scales by group or channel, not one per tensor"
    return None


def stored_zeros(q: QTensor) -> Tensor:
    """Zero points [out, groups] uint8; a symmetric weight's are all at the centre of its codes.

    Raises InputError where its scales are not float16.
    """
    if q.scales.dtype != torch.float16:
        raise InputError(
            f"scales are {q.scales.dtype}, this format stores float16",
            hint="re-lay the weight out first, which says whether its scales fit",
        )
    if q.zeros is not None:
        return q.zeros
    return torch.full(q.scales.shape, centre(q.spec), dtype=torch.uint8, device=q.codes.device)


def take_packed(
    fmt: Format, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`qweight`, `qzeros` and `scales` of a weight [out, in] as they lie there; InputError for one
    that does not fit, or a spec that the format does not accept."""
    scheme = Scheme(weight=spec)
    if reason := fmt.accepts(scheme, shape):
        raise InputError(f"tensor 'qweight': {reason}")
    shapes = fmt.shapes(scheme, shape, torch.float16)
    packed, zeros = (
        take(tensors, name, shape=shapes[name].shape, dtypes=(torch.int32,))
        for name in ("qweight", "qzeros")
    )
    return packed, zeros, take_scales(tensors, "scales", spec=spec, shape=shapes["scales"].shape)


def with_zeros(spec: QuantSpec, *, codes: Tensor, scales: Tensor, zeros: Tensor) -> QTensor:
    """The QTensor of tensors in [out, …] order; a symmetric spec needs every zero at the centre."""
    if spec.symmetric and not bool((zeros == centre(spec)).all()):
        raise InputError(
            f"tensor 'qzeros' holds zero points other than {centre(spec)}, "
            "but the weight is declared symmetric"
        )
    return QTensor(
        spec=spec,
        codes=codes.contiguous(),
        scales=scales.contiguous(),
        zeros=None if spec.symmetric else zeros.contiguous(),
    )


def centre(spec: QuantSpec) -> int:
    """The code that stands for zero in a symmetric weight."""
    return int(2 ** (spec.bits - 1))


def common_spec(schemes: ModelSchemes, *, name: str) -> QuantSpec | None:
    """What all quantized linears share, asymmetric if any is; None where none is quantized.

    Raises InputError where they differ in bits or group size, or the KV cache is quantized.
    """
    if schemes.kv is not None:
        raise InputError(f"{name} cannot say that the KV cache is quantized")
    found = {m: s.weight for m, s in schemes.linears.items() if s.weight is not None}
    if not found:
        return None
    first, spec = next(iter(found.items()))
    for module, other in found.items():
        if (other.bits, group_size(other)) != (spec.bits, group_size(spec)):
            raise InputError(
                f"{name} has one bit width and group size: {first} has {spec.bits} bits by "
                f"{group_size(spec)}, {module} {other.bits} by {group_size(other)}",
                hint="use the compressed-tensors format",
            )
    any_zero = next((other for other in found.values() if not other.symmetric), spec)
    return replace(spec, zero=any_zero.zero)


def read_spec(config: Mapping[str, Any], *, symmetric: bool) -> QuantSpec:
    """The spec of every quantized linear, with float16 scales. Raises InputError."""
    size = read_group_size(config)
    return QuantSpec(
        element="int",
        bits=config_number(config, "bits"),
        strategy="channel" if size is None else "group",
        group_size=size,
        zero="none" if symmetric else "subtract",
        scale_dtype=torch.float16,
    )


def stored_schemes(spec: QuantSpec, linears: Mapping[str, Headers]) -> ModelSchemes:
    """The checkpoint's spec for every linear with a `qweight`, in the dtype its scales are in."""
    found = {}
    for module, tensors in linears.items():
        found[module] = Scheme()
        if "qweight" in tensors:
            scales = tensors.get("scales")
            if scales is None or scales.dtype not in SCALE_DTYPES:
                raise InputError(f"{module}.scales is missing or has an unknown dtype")
            found[module] = Scheme(weight=replace(spec, scale_dtype=scales.dtype))
    return ModelSchemes(linears=found)
