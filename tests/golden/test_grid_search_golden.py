"""Searched grids against those of AutoRound's searches, by the error that both make least."""

import pytest
import torch

from compressor.ir.qtensor import QTensor, QuantSpec, spread
from compressor.numerics import nearest_codes
from compressor.numerics.grid_search import search_grid
from tests.support.golden_files import vectors

TINY = 5
"""A row of 1e-6, whose symmetric scales are ours at least 1e-5 / 2^(b-1), as everywhere here."""


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("search", ["search_scales", "search_scales_plain", "neuqi"])
def test_errors_are_those_of_autoround(search, bits, size):
    found = vectors("rounding/init_scales")
    weight, kind = found["weight"], f"b{bits}.g{size}"
    diagonal = torch.ones(256) if search.endswith("plain") else found["imatrix"]
    zeros, name = None, f"{search}.{kind}"
    if search == "neuqi":
        zeros, name = found[f"neuqi.zero.{kind}"].view(6, -1), f"neuqi.scale.{kind}"
    zero = "none" if zeros is None else "subtract"
    spec = QuantSpec("int", bits, "group", size, zero=zero)
    scales = found[name].float().view(6, -1)
    codes = nearest_codes(
        weight,
        spec,
        scales=spread(scales, spec, (6, 256)),
        zeros=None if zeros is None else spread(zeros, spec, (6, 256)),
    )
    theirs = QTensor(spec, codes, scales, zeros)
    ours = search_grid(weight, diagonal, spec)
    errors = [((q.dequantize() - weight).square() * diagonal).sum(1) for q in (ours, theirs)]
    rows = [row for row in range(6) if row != TINY or zeros is not None]
    assert (errors[0] <= 1.1 * errors[1])[rows].all()
    assert errors[0][rows].sum() <= 1.07 * errors[1][rows].sum()
