"""Exact symmetries do not count as errors, however strong they are and however they overlap."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.checkpoint.source import open_source
from compressor.ir.layout import Rows, UnitLayout
from compressor.numerics.folding import fold
from compressor.verify.compare import Difference, UnitComparison


def differences(
    unit: UnitLayout, written: Mapping[str, Tensor], original: Mapping[str, Tensor]
) -> dict[str, Difference]:
    comparison = UnitComparison(unit, written, dict(original), {}, torch.bfloat16)
    return {row.name: row for row in comparison.differences()}


def test_strong_scales_at_both_ends_of_a_linear_are_seen_through(tiny_model):
    source = open_source(tiny_model("llama"))
    unit = source.layout.units[1]
    original = source.read_unit(unit).dequantized()
    generator = torch.Generator().manual_seed(0)
    written = dict(original)
    for site in unit.folds:
        rows = site.rows or Rows("", 0, original[f"{site.source}.weight"].shape[0])
        # Rows made three times as large hide that columns became half as large.
        size = 0.5 if site.kind == "norm" else 1 / 3
        scale = size * (1 + torch.rand(rows.total, generator=generator))
        scale[0] = 1e-4
        written |= fold(written, site, unit, scale)
    for found in differences(unit, written, original).values():
        assert found.error < 1e-5 and found.problem is None, found


def test_what_is_no_rescaling_is_an_error(tiny_model):
    source = open_source(tiny_model("llama"))
    unit = source.layout.units[1]
    original = source.read_unit(unit).dequantized()
    name = next(x.name for x in unit.linears if x.role == "mlp.gate")
    written = {**original, f"{name}.weight": original[f"{name}.weight"].roll(1, 0)}
    found = differences(unit, written, original)
    wrong = found.pop(name)
    assert wrong.error > 1 and wrong.problem is not None
    assert max(row.error for row in found.values()) < 1e-5
