"""Inputs rounded one after the other against the plain reference."""

import pytest
import torch
from compressor_kernels.search.column_rounding import round_columns, round_columns_ref

from compressor.methods.gptq import Gptq
from compressor.numerics import quantize
from compressor.numerics.columns import Columns
from compressor.numerics.gptq import gptq, inverse_factor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(count, rows, *, groups=3, zeros=False, bits=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    scales = drawn(groups, rows).abs() * 0.3 + 0.05
    scales[0, 0] = 0 if not zeros else scales[0, 0]
    points = torch.randint(0, 2**bits, (groups, rows), generator=generator).float()
    which = (torch.arange(count) * groups // count).int()
    found = (drawn(count, rows), drawn(count, count) * 0.1, which, scales)
    return [x.to(DEVICE) for x in found], points.to(DEVICE) if zeros else None


@pytest.mark.parametrize("descent", [False, True])
@pytest.mark.parametrize(
    ("kind", "bits", "zeros"),
    [("int", 4, False), ("int", 3, True), ("int", 8, False), ("e2m1", 4, 0)],
)
@pytest.mark.parametrize(("count", "rows"), [(16, 5), (37, 9)])
def test_codes_and_errors(count, rows, kind, bits, zeros, descent):
    given, points = case(count, rows, zeros=zeros, bits=bits)
    if kind == "int":
        given[3].clamp_(min=0.05)
    now = given[0].flip(0).contiguous() if descent else None
    options = {"kind": kind, "bits": bits, "now": now, "lowest": int(kind == "int" and bits == 8)}
    before = given[0].clone()
    codes, errors = round_columns(*given, points, **options)
    wanted = round_columns_ref(*given, points, **options)
    assert torch.equal(given[0], before)
    # One code that falls on the other side of a tie changes all that come after it in its row.
    same = (codes == wanted[0]).all(0)
    assert same.float().mean() >= (1.0 if DEVICE == "cpu" else 0.9)
    assert torch.allclose(errors[:, same], wanted[1][:, same], atol=1e-5)


@pytest.mark.parametrize("spec", [{}, {"symmetric": False, "bits": 3}, {"grid": "nvfp4"}])
def test_gptq_and_descent_are_the_same_through_it(spec, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 32, generator=generator).to(DEVICE)
    x = torch.randn(96, 32, generator=generator) + torch.randn(96, 1, generator=generator)
    inverse = inverse_factor((x.T @ x).to(DEVICE), damping=0.1)
    spec = Gptq(**({"group_size": 16} if not spec.get("grid") else {}), **spec).effects()
    nearest = quantize(weight, spec.scheme.weight)
    found = []
    for fused in (False, True):
        monkeypatch.setattr(Columns, "fused", fused)
        found.append(gptq([weight], [nearest], inverse, descent=2)[0])
    plain, ours = found
    assert ours.error == pytest.approx(plain.error, rel=1e-3 if DEVICE == "cpu" else 0.05)
    assert ours.error < ours.nearest
    assert DEVICE != "cpu" or torch.equal(ours.q.codes, plain.q.codes)


@pytest.mark.parametrize("zeros", [False, True])
def test_several_weights_at_a_time_are_rounded_as_each_alone(zeros):
    """Rows of one weight do not fill its last program."""
    cases = [case(21, 6, zeros=zeros, seed=seed) for seed in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*(given for given, _ in cases), strict=True)]
    points = torch.stack([p for _, p in cases]) if zeros else None
    codes, errors = round_columns(*stacked, points, kind="int")
    for i, (given, own) in enumerate(cases):
        alone = round_columns(*given, own, kind="int")
        assert torch.equal(codes[i], alone[0]) and torch.equal(errors[i], alone[1])


def test_shapes_that_do_not_fit():
    given, _ = case(16, 5)
    with pytest.raises(ValueError, match=r"for \[16, 5\]"):
        round_columns(given[0], given[1][:8], *given[2:], None, kind="int")
    with pytest.raises(ValueError, match="rows"):
        round_columns(*given[:3], given[3][:, :2], None, kind="int")
