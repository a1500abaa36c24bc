"""Errors of an output from a Gram matrix, against float64 and against tokens."""

import pytest
import torch
from compressor_kernels.search.gram_error import (
    BAND,
    SMALL_TILES,
    GramTiles,
    _work,
    gram_error,
    gram_error_ref,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = GramTiles(32, 64, 32, num_warps=4, num_stages=2)
TALL = GramTiles(64, 32, 16, num_warps=4, num_stages=2)


def problem(rows, columns, *, seed=0, device=DEVICE):
    """Δ and a Gram matrix with a few large channels, its lower half NaN.

    All are positive, so that every element of the square counts.
    """
    generator = torch.Generator(device).manual_seed(seed + rows + 3 * columns)
    delta = torch.rand(rows, columns, generator=generator, device=device).bfloat16()
    x = torch.rand(columns + 5, columns, generator=generator, device=device)
    x *= torch.exp(torch.randn(columns, generator=generator, device=device))
    gram = x.t() @ x
    below = torch.ones_like(gram, dtype=torch.bool).tril(-1)
    return delta, gram.masked_fill_(below, torch.nan)


def assert_equal(found, want):
    """Equal up to sums in float32, of which tensor cores cut off what does not fit."""
    rel = 2e-6 if DEVICE == "cpu" else 1e-4
    assert found.shape == () and found.dtype == torch.float32
    assert float(found) == pytest.approx(float(want), rel=rel)


def test_the_reference_is_the_output_error():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(9, 40, generator=generator).bfloat16()
    x = torch.randn(70, 40, generator=generator)
    want = (x.double() @ delta.double().t()).square().sum()
    assert float(gram_error_ref(delta, x.t() @ x)) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("tiles", [SMALL, TALL])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 7), (40, 96), (33, 63), (64, 128), (97, 200), (3, 65)]
)
def test_shapes(rows, columns, tiles):
    delta, gram = problem(rows, columns)
    assert_equal(gram_error(delta, gram, tiles=tiles), gram_error_ref(delta, gram))


@pytest.mark.parametrize("tiles", [GramTiles(), SMALL_TILES])
def test_tiles_of_devices(tiles):
    delta, gram = problem(70, 300)
    if tiles == GramTiles() and DEVICE == "cuda":
        tiles = None  # whichever the device has shared memory for
    assert_equal(gram_error(delta, gram, tiles=tiles), gram_error_ref(delta, gram))


def test_each_element_once_on_the_diagonal_and_twice_above_it():
    """Whole numbers, so that one element too many or too few shows."""
    columns = 150
    delta = torch.ones(1, columns, dtype=torch.bfloat16, device=DEVICE)
    gram = torch.ones(columns, columns, device=DEVICE)
    for tiles in (SMALL, TALL):
        assert float(gram_error(delta, gram, tiles=tiles)) == columns**2
        assert float(gram_error(delta, torch.diag(gram[0]), tiles=tiles)) == columns


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (40, 70)])  # whole steps of SMALL, or not
@pytest.mark.parametrize("shared", [True, False])
def test_a_stack_is_its_parts(rows, columns, shared):
    both = [problem(rows, columns, seed=seed) for seed in range(3)]
    delta = torch.stack([delta for delta, _ in both])
    grams = both[0][1] if shared else torch.stack([gram for _, gram in both])
    found = gram_error(delta, grams, tiles=SMALL)
    want = gram_error_ref(delta, grams)
    assert found.shape == want.shape == (3,)
    for one, other in zip(found, want, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("rows", [64, 40])  # whole steps of SMALL, or not
def test_errors_meet_fewer_gram_matrices_in_turn(rows):
    parts = [problem(rows, 70, seed=seed) for seed in range(6)]
    delta, grams = torch.stack([d for d, _ in parts]), torch.stack([g for _, g in parts[:2]])
    found, want = gram_error(delta, grams, tiles=SMALL), gram_error_ref(delta, grams)
    for number, (one, other) in enumerate(zip(found, want, strict=True)):
        assert_equal(one, other)
        assert_equal(one, gram_error_ref(delta[number], grams[number % 2]))
    with pytest.raises(ValueError, match="do not fit"):
        gram_error(delta[:5], grams, tiles=SMALL)


@pytest.mark.parametrize("cut", ["rows", "columns", "odd", "turned"])
def test_strides(cut):
    delta, gram = problem(48, 96)
    view = {
        "rows": lambda x: x[8:],
        "columns": lambda x: x[:, 16:80],
        "odd": lambda x: x[:, 3:50],
        "turned": lambda x: x.t().contiguous().t(),
    }[cut]
    part = view(delta)
    first = {"columns": 16, "odd": 3}.get(cut, 0)
    corner = gram[first : first + part.shape[1], first : first + part.shape[1]]
    assert_equal(gram_error(part, corner, tiles=SMALL), gram_error_ref(part, corner))
    turned = corner.t().contiguous().t()
    assert_equal(gram_error(part, turned, tiles=SMALL), gram_error_ref(part, corner))


def test_nothing_is_no_error():
    for shape in ((0, 16), (4, 0)):
        delta = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
        assert gram_error(delta, torch.zeros(shape[1], shape[1], device=DEVICE)) == 0


def test_values_that_are_not_finite_show():
    delta, gram = problem(20, 64)
    delta[3, 5] = torch.nan
    assert gram_error(delta, gram, tiles=SMALL).isnan()


def test_what_does_not_fit_is_refused():
    delta, gram = problem(8, 16)
    with pytest.raises(ValueError, match="do not fit"):
        gram_error(delta, gram[:8, :8])
    with pytest.raises(ValueError, match="bfloat16"):
        gram_error(delta.float(), gram)
    with pytest.raises(ValueError, match="bfloat16"):
        gram_error(delta, gram.bfloat16())


@pytest.mark.parametrize("tiles", [GramTiles(), GramTiles(256, 128), SMALL, TALL])
@pytest.mark.parametrize(("rows", "columns"), [(12288, 4096), (100, 576), (64, 2 * BAND + 40)])
@pytest.mark.parametrize("count", [1, 3])
def test_work_covers_the_upper_half_once(count, rows, columns, tiles):
    work, most = _work(count, rows, columns, tiles, torch.device("cpu"))
    steps = -(-rows // tiles.block_k)
    down, across = (-(-columns // side) for side in (tiles.block_m, tiles.block_n))
    taken = torch.zeros(count, down, across, dtype=torch.long)
    for row, column, first, last, number, place in work.tolist():
        assert number * steps <= first < last <= (number + 1) * steps and place < most
        taken[number, row, column] += last - first
    assert len({(number, place) for *_, number, place in work.tolist()}) == len(work)
    ends = torch.arange(1, across + 1) * tiles.block_n
    live = ends > torch.arange(down)[:, None] * tiles.block_m
    assert torch.equal(taken, (live * steps).expand(taken.shape))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(12288, 4096), (4096, 11008), (1003, 4096), (1536, 576), (576, 1536), (777, 1001)],
)
def test_real_shapes_on_a_device(rows, columns):
    delta, gram = problem(rows, columns, device="cuda")
    found = gram_error(delta, gram)
    assert_equal(found, gram_error_ref(delta, gram))
    for _ in range(3):
        assert torch.equal(gram_error(delta, gram), found)
