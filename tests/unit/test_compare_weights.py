"""Exact rescalings do not count as errors, however strong they are and however they overlap."""

from __future__ import annotations

import torch

from compressor.compare_weights import layer_errors
from compressor.folding import fold
from compressor.source import open_source


def test_strong_scales_at_both_ends_of_a_linear_are_seen_through(tiny_model):
    source = open_source(tiny_model("llama"))
    unit = source.layout.units[1]
    original = source.read_unit(unit).dequantized()
    generator = torch.Generator().manual_seed(0)
    written = dict(original)
    for site in unit.folds:
        rows = site.rows or (0, original[f"{site.source}.weight"].shape[0])
        # Rows made three times as large hide that columns became half as large.
        size = 0.5 if site.kind == "norm" else 1 / 3
        scale = size * (1 + torch.rand(rows[1] - rows[0], generator=generator))
        scale[0] = 1e-4
        written |= fold(written, site, unit, scale)
    for found in layer_errors(unit, written=written, original=original, specs={}):
        assert found.error < 1e-5, found


def test_what_is_no_rescaling_is_an_error(tiny_model):
    source = open_source(tiny_model("llama"))
    unit = source.layout.units[1]
    original = source.read_unit(unit).dequantized()
    name = next(x.name for x in unit.linears if x.role == "mlp.gate")
    written = {**original, f"{name}.weight": original[f"{name}.weight"].flip(0)}
    errors = {
        x.linear: x.error for x in layer_errors(unit, written=written, original=original, specs={})
    }
    assert errors.pop(name) > 1
    assert max(errors.values()) < 1e-5
