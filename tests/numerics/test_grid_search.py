"""Searched integer grids: never worse than the whole range's, close to the best there is."""

import itertools

import pytest
import torch

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.numerics import nearest_codes, quantize
from compressor.numerics.grid_search import search_grid

GROUP_KINDS = {"channel": None, "group": 16}


def spec_of(bits, zero="subtract", group=16, scale_dtype=torch.float16):
    strategy = "channel" if group is None else "group"
    return QuantSpec("int", bits, strategy, group, zero=zero, scale_dtype=scale_dtype)


def groups_of_all_kinds(seed=0):
    """Rows [8, 64]: normal, of one sign, zero, with an outlier, tiny, huge, constant."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 64, generator=generator) * 0.05
    weight[1].abs_()
    weight[2] = -weight[2].abs()
    weight[3] = 0
    weight[4, ::20] = 1.5
    weight[5] *= 1e-6
    weight[6] *= 1e6
    weight[7] = 0.3
    return weight, torch.randn(64, generator=generator).exp()


def errors(q, weight, diagonal):
    found = (q.dequantize() - weight).square() * diagonal
    return found.view(*q.scales.shape, -1).sum(-1)


@pytest.mark.parametrize("strategy", GROUP_KINDS)
@pytest.mark.parametrize("zero", ["none", "subtract"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_no_group_is_worse_than_on_its_whole_range(bits, zero, strategy):
    spec = spec_of(bits, zero, GROUP_KINDS[strategy])
    weight, diagonal = groups_of_all_kinds()
    found, whole = search_grid(weight, diagonal, spec), quantize(weight, spec)
    ours, theirs = (errors(q, weight, diagonal) for q in (found, whole))
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < theirs.sum()
    assert found.scales.dtype == spec.scale_dtype and (found.scales != 0).all()
    assert int(found.codes.max()) < 2**bits
    if zero == "none":
        assert found.zeros is None
    else:  # zero is a level of every grid
        assert (found.zeros.int() < 2**bits).all() and (found.scales > 0).all()


@pytest.mark.parametrize("zero", ["none", "subtract"])
@pytest.mark.parametrize("bits", [2, 3])
def test_it_is_close_to_the_best_of_all_grids(bits, zero):
    """Tiny groups against every zero point beside two thousand scales."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 12, generator=generator)
    diagonal = torch.rand(12, generator=generator) + 0.1
    spec = spec_of(bits, zero, group=12, scale_dtype=torch.float32)
    best = torch.full((40, 1), torch.inf)
    scales = torch.linspace(0.02, 2.5, 2000)
    if zero == "none":
        scales = torch.cat([scales, -scales])
    zeros = range(2**bits) if zero == "subtract" else [None]
    for scale, point in itertools.product(scales.tolist(), zeros):
        s = torch.full((40, 1), scale)
        z = None if point is None else torch.full((40, 1), point, dtype=torch.uint8)
        codes = nearest_codes(weight, spec, scales=s, zeros=z)
        best = torch.minimum(best, errors(QTensor(spec, codes, s, z), weight, diagonal))
    ours = errors(search_grid(weight, diagonal, spec), weight, diagonal)
    assert (ours / best).median() < 1.03
    assert ours.sum() < 1.1 * best.sum() < errors(quantize(weight, spec), weight, diagonal).sum()


def test_inputs_that_weigh_nothing_do_not_decide():
    weight, diagonal = groups_of_all_kinds()
    weight[0, 5] = 0.4
    diagonal[5] = 0
    spec = spec_of(4)
    found = search_grid(weight, diagonal, spec)
    assert found.scales[0, 0] < 0.6 * quantize(weight, spec).scales[0, 0]
    nothing = search_grid(weight, torch.zeros(64), spec)
    assert torch.equal(nothing.codes, quantize(weight, spec).codes)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_diagonal_that_is_not_finite_changes_nothing(value):
    weight, diagonal = groups_of_all_kinds()
    diagonal[:] = value
    for zero in ("none", "subtract"):
        found, whole = (
            search_grid(weight, diagonal, spec_of(4, zero)),
            quantize(weight, spec_of(4, zero)),
        )
        assert torch.equal(found.scales, whole.scales) and torch.equal(found.codes, whole.codes)


def test_narrow_grids_have_positive_scales_and_no_lowest_code():
    weight, diagonal = groups_of_all_kinds()
    found = search_grid(weight, diagonal, spec_of(8, "none", None), narrow=True)
    assert (found.scales > 0).all() and (found.codes >= 1).all()


def test_rows_are_searched_alone_or_together(monkeypatch):
    weight, diagonal = groups_of_all_kinds()
    whole = search_grid(weight, diagonal, spec_of(3))
    monkeypatch.setattr(
        "compressor.numerics.grid_search.row_chunks",
        lambda w, **how: (slice(i, i + 3) for i in (0, 3, 6)),
    )
    parts = search_grid(weight, diagonal, spec_of(3))
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.zeros, parts.zeros)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="do not divide"):
        search_grid(torch.randn(4, 60), torch.ones(60), spec_of(4))
