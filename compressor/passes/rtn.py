"""Round-to-nearest: integer weights without calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compressor_calibration.stats import SiteStats
from pydantic import Field
from torch import Tensor

from compressor.layout import Linear
from compressor.numerics import quantize
from compressor.passes.base import Pass, PassContext, PassResult, Unit, output_error
from compressor.qtensor import QTensor, QuantSpec
from compressor.scheme import Scheme


class Rtn(Pass):
    """Round every weight to the nearest value of its group's grid, without calibration data."""

    version: ClassVar[int] = 1
    quantizes: ClassVar[bool] = True

    bits: int = Field(4, ge=2, le=8, description="bits of one weight")
    group_size: int | None = Field(
        128, ge=1, description="neighbouring inputs that share a scale; null for a whole row"
    )
    symmetric: bool = Field(True, description="grids centred on zero; false stores zero points")

    def scheme(self) -> Scheme:
        return Scheme(weight=int_spec(self.bits, self.group_size, symmetric=self.symmetric))

    def check(self, linear: Linear) -> str | None:
        return uneven_groups(linear, self.group_size)

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        rows = []
        for linear in context.selected:
            spec = context.spec(linear)
            if spec is None:
                continue
            weight = unit.weight(linear)
            q = quantize(weight, spec)
            rows.append(weight_row(linear, weight, q, stats=context.stats.get(linear.site)))
            unit = unit.with_quantized(linear, q)
        return PassResult(unit, rows)


def int_spec(bits: int, group_size: int | None, *, symmetric: bool) -> QuantSpec:
    """Integer weights with a scale per group, or per output channel where there is no group."""
    return QuantSpec(
        element="int",
        bits=bits,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        zero="none" if symmetric else "subtract",
    )


def uneven_groups(linear: Linear, group_size: int | None) -> str | None:
    """Why a linear's inputs cannot be cut into groups, or None."""
    if group_size is None or linear.in_features % group_size == 0:
        return None
    fits = [size for size in (128, 64, 32, 16) if linear.in_features % size == 0]
    hint = f"; {', '.join(map(str, fits))} would" if fits else "; null (a whole row) would"
    return f"group_size {group_size} does not divide its {linear.in_features} inputs{hint}"


def weight_row(
    linear: Linear, weight: Tensor, q: QTensor, *, stats: SiteStats | None
) -> Mapping[str, Any]:
    """A report row: the relative squared error of the output, or where the site's Gram matrix was
    not collected, of the weight."""
    known = stats is not None and stats.needs.gram and stats.tokens > 0
    gram = stats.gram if stats is not None and known else None
    return {
        "linear": linear.name,
        "bits": q.spec.bits,
        "error": output_error(weight, q.dequantize(), gram),
        "error_of": "output" if known else "weight",
    }


PASS = Rtn
