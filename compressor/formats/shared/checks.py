"""Checks before a value is written and after a tensor is read; each failure is an InputError."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight_of(scheme: Scheme) -> QuantSpec:
    """The spec of a scheme that quantizes its weight."""
    assert scheme.weight is not None
    return scheme.weight


def int_reason(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    """Why `spec` is not a plain integer weight for a shape [out, in], or None."""
    if spec.element != "int":
        return f"it holds integers, not {spec.element}"
    if spec.second != "none":
        return "it has no second-level scale"
    if spec.zero == "offset":
        return "its zero points are subtracted from codes, not from values"
    if spec.strategy == "block":
        return "it has no two-dimensional blocks"
    if spec.strategy == "group":
        size = spec.group_size or 0
        if size < 1 or shape[1] % size:
            return f"{shape[1]} inputs do not divide into groups of {spec.group_size}"
    return None


class Look(NamedTuple):
    """What is wrong where the largest magnitude of some values is above `most`, or one is NaN."""

    largest: Tensor
    most: float
    wrong: str


def int_looks(q: QTensor) -> list[Look]:
    """What is to be asked of an integer QTensor's values; InputError where dtypes and shapes break
    its own spec."""
    spec = q.spec
    expected = spec.scale_shape(*q.shape)
    top = 2**spec.bits - 1
    too_large = f"codes are not uint8 values of 0 … {top}"
    if q.codes.dtype != torch.uint8:
        raise InputError(too_large)
    if tuple(q.scales.shape) != expected or q.scales.dtype != spec.scale_dtype:
        raise InputError(
            f"scales are {describe(q.scales)}, the spec says {spec.scale_dtype} {list(expected)}"
        )
    if (q.zeros is None) != spec.symmetric:
        raise InputError("zero points do not go with the spec")
    if q.zeros is not None and (tuple(q.zeros.shape) != expected or q.zeros.dtype != torch.uint8):
        raise InputError(f"zero points are {describe(q.zeros)}, not uint8 {list(expected)}")
    looks = []
    if q.scales.numel():
        norm = torch.linalg.vector_norm(q.scales, torch.inf)
        looks.append(Look(norm, torch.finfo(norm.dtype).max, "scales hold NaN or infinity"))
    if q.codes.numel():
        looks.append(Look(q.codes.amax(), top, too_large))
    if q.zeros is not None and q.zeros.numel():
        looks.append(Look(q.zeros.amax(), top, f"a zero point is above {top}"))
    return looks


def require(looks: Sequence[Look]) -> None:
    """InputError for the first of them that shows something wrong. Asked at once: each answer waits
    for the device."""
    told = torch.stack([look.largest.float() for look in looks]).tolist() if looks else []
    for look, value in zip(looks, told, strict=True):
        if not value <= look.most:
            raise InputError(look.wrong)


def check_values(q: QTensor) -> QTensor:
    """The QTensor; InputError where it, of floats, breaks its own spec or is not finite."""
    expected = q.spec.scale_shape(*q.shape)
    if q.codes.dtype != torch.uint8:
        raise InputError(f"codes are {describe(q.codes)}, not uint8")
    if tuple(q.scales.shape) != expected or q.scales.dtype != q.spec.scale_dtype:
        raise InputError(
            f"scales are {describe(q.scales)}, the spec says {q.spec.scale_dtype} {list(expected)}"
        )
    if not finite(q.scales):
        raise InputError("scales hold NaN or infinity")
    if q.spec.element == "fp4_e2m1" and bool((q.codes > 15).any()):
        raise InputError("codes are not uint8 values of 0 … 15")
    if q.spec.element == "fp8_e4m3" and bool(((q.codes & 127) == 127).any()):
        raise InputError("codes hold NaN")
    return q


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; float8 included, for which torch has no isfinite."""
    return bool(torch.isfinite(tensor.float()).all())


def take(
    tensors: Mapping[str, Tensor],
    name: str,
    *,
    shape: tuple[int, ...],
    dtypes: Collection[torch.dtype],
) -> Tensor:
    """The tensor `name`; InputError where it is missing or has another dtype or shape."""
    tensor = tensors.get(name)
    if tensor is None:
        raise InputError(f"tensor {name!r} is missing")
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"tensor {name!r} is {describe(tensor)}, not {wanted} {list(shape)}")
    return tensor


def matrix_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of the tensor `name`; InputError where it is missing or not a matrix."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != 2:
        raise InputError(f"tensor {name!r} is missing or not a matrix")
    return tensor.shape[0], tensor.shape[1]


def take_scales(
    tensors: Mapping[str, Tensor], name: str, *, spec: QuantSpec, shape: tuple[int, ...]
) -> Tensor:
    """Finite scales in the spec's dtype."""
    scales = take(tensors, name, shape=shape, dtypes=(spec.scale_dtype,))
    if not finite(scales):
        raise InputError(f"tensor {name!r} holds NaN or infinity")
    return scales


def refuse_other(entry: Mapping[str, Any], values: Mapping[str, Any], *, where: str) -> None:
    """InputError for a key of a config's entry that has another value."""
    for key, value in values.items():
        if entry.get(key) != value:
            raise InputError(f"{where}.{key} is {entry.get(key)!r}, not {value!r}")


def describe(tensor: Tensor) -> str:
    """Dtype and shape in few words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
