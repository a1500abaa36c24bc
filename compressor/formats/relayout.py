"""Moving a quantized weight between formats: its codes never change.

What may have no exact form in the target is a scale (another float dtype) or a zero point (a
format for symmetric weights only). Nothing is rounded unless that is allowed, and then only scales.
NVFP4's global scale is a multiplier in one format and a divisor in another: it moves to the nearest
multiplier that is some divisor's reciprocal, at most one ulp away, which is reported and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.errors import InputError, several
from compressor.formats.base import Format
from compressor.formats.shared.e2m1 import divisor_of
from compressor.ir.qtensor import QTensor
from compressor.ir.scheme import ActivationSpec, Scheme


@dataclass(frozen=True, slots=True)
class RoundingReport:
    """Values (a weight's scales) that were rounded to the target's dtype, or to the reciprocal of
    a divisor.

    max_relative_error  largest |rounded − scale| / |scale|; it is also that of the weight itself
    """

    name: str
    source_dtype: torch.dtype
    target_dtype: torch.dtype
    rounded: int
    total: int
    max_relative_error: float

    def __str__(self) -> str:
        source, target = (
            str(d).removeprefix("torch.") for d in (self.source_dtype, self.target_dtype)
        )
        if source == target:
            target = f"{target} as divisors"
        return (
            f"{self.name}: {self.rounded} of {self.total} {source} values have no exact form in "
            f"{target}; the nearest is off by up to {self.max_relative_error:.2g} of its value"
        )


def relayout(
    q: QTensor,
    source: Format,
    target: Format,
    *,
    name: str,
    model_dtype: torch.dtype,
    allow_rounding: bool,
    input: ActivationSpec | None = None,
) -> tuple[QTensor, RoundingReport | None]:
    """The same weight with the spec and the scale dtype that `target` stores.

    name         the weight in error messages
    model_dtype  dtype of the source checkpoint; the target may choose another
    Raises InputError where the target has no form for the weight: for its kind, for zero points
    off the centre in a symmetric-only target, or for scales where rounding is not allowed or
    would make them infinite.
    """
    q = _accepted(q, source, target, name=name, input=input)
    if reason := target.lacks(q):
        raise InputError(f"{name}: {source.name} to {target.name}: {reason}")
    dtype = target.scale_dtype(q.spec, target.model_dtype(model_dtype))
    scales = q.scales.to(dtype)
    if not bool(torch.isfinite(scales.to(torch.float32)).all()):
        raise InputError(
            f"{name}: scales up to {float(q.scales.float().max()):.3g} are infinite in {dtype}"
        )
    report = compare(q.scales, scales, name=name)
    if report is not None and not allow_rounding:
        raise rounding_refused([report], source, target)
    second = q.second
    if target.stores_divisors and second is not None and q.spec.second == "tensor":
        moved = divisor_of(second).reciprocal()
        report = report or compare(second, moved, name=name)
        second = moved
    return replace(q, spec=replace(q.spec, scale_dtype=dtype), scales=scales, second=second), report


def rounding_refused(
    reports: Sequence[RoundingReport], source: Format, target: Format
) -> InputError:
    """All that would be rounded, told by the worst of it."""
    worst = max(reports, key=lambda report: report.max_relative_error)
    left = [report.name for report in reports if report is not worst]
    more = f", and less in {several(left, 3)}" if left else ""
    return InputError(
        f"{source.name} to {target.name}: {worst}{more}",
        hint="--allow-rounding writes the nearest values",
    )


def as_asymmetric(q: QTensor) -> QTensor:
    """A symmetric integer weight with its zero point written out; the same codes and values."""
    if q.spec.element != "int" or not q.spec.symmetric:
        return q
    zeros = torch.full(
        q.scales.shape, 2 ** (q.spec.bits - 1), dtype=torch.uint8, device=q.scales.device
    )
    return replace(q, spec=replace(q.spec, zero="subtract"), zeros=zeros)


def as_symmetric(q: QTensor) -> QTensor | None:
    """The weight without zero points where all of them are at the centre of the codes, or None."""
    if q.zeros is None:
        return q
    if q.spec.zero != "subtract" or not bool((q.zeros == 2 ** (q.spec.bits - 1)).all()):
        return None
    return replace(q, spec=replace(q.spec, zero="none"), zeros=None)


def _accepted(
    q: QTensor, source: Format, target: Format, *, name: str, input: ActivationSpec | None
) -> QTensor:
    """The form of `q`, with or without zero points, that `target` takes."""
    reason = target.accepts(Scheme(weight=q.spec, input=input), q.shape)
    if reason is None:
        return q
    other = as_asymmetric(q) if q.spec.symmetric else as_symmetric(q)
    if (
        other is not None
        and target.accepts(Scheme(weight=other.spec, input=input), q.shape) is None
    ):
        return other
    raise InputError(f"{name}: {source.name} to {target.name}: {reason}")


def compare(before: Tensor, after: Tensor, *, name: str) -> RoundingReport | None:
    """What was rounded between a tensor and the same in another dtype; None for nothing."""
    old, new = before.to(torch.float64), after.to(torch.float64)
    changed = old != new
    if not bool(changed.any()):
        return None
    error = ((new - old).abs() / old.abs())[changed]
    return RoundingReport(
        name=name,
        source_dtype=before.dtype,
        target_dtype=after.dtype,
        rounded=int(changed.sum()),
        total=old.numel(),
        max_relative_error=float(error.max()),
    )
