"""Sums of inputs by channel, against float64."""

import pytest
import torch
from compressor_kernels.inputs.channel_sums import ROWS, channel_sums, channel_sums_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(rows, channels, dtype, seed=0):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x, sizes, *, copy=True):
    found, wanted = channel_sums(x, sizes, copy=copy), channel_sums_ref(x, sizes, copy=copy)
    assert torch.equal(found.good, wanted.good) and torch.equal(found.counts, wanted.counts)
    assert torch.equal(found.largest, wanted.largest)
    assert torch.allclose(found.magnitudes, wanted.magnitudes, rtol=2e-6, atol=0)
    if copy:
        assert torch.equal(found.rows, wanted.rows) and found.rows.dtype == x.dtype
    else:
        assert found.rows is None
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "channels"), [([5], 3), ([300], 33), ([2, 0, 257, 1], 270), ([ROWS, ROWS], 256)]
)
def test_sums(sizes, channels, dtype):
    check(drawn(sum(sizes), channels, dtype).to(DEVICE), sizes)


def test_rows_that_are_not_finite_count_nowhere_and_the_input_stays():
    x = drawn(40, 1100, torch.bfloat16)
    x[3, 2], x[17, 0], x[17, 1099], x[39, 8] = torch.nan, torch.inf, -torch.inf, torch.nan
    before = x.clone()
    found = check(x.to(DEVICE), [20, 20])
    assert found.counts.tolist() == [[18, 2], [19, 1]]
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))


def test_largest_values_do_not_overflow():
    x = torch.full((3, 5), torch.finfo(torch.float16).max, dtype=torch.float16, device=DEVICE)
    assert check(x, [3]).counts.tolist() == [[3, 0]]


def test_a_place_has_the_same_bits_alone():
    x = drawn(700, 40, torch.bfloat16).to(DEVICE)
    together, alone = (
        channel_sums(x, [300, 400], copy=False),
        channel_sums(x[300:], [400], copy=False),
    )
    assert torch.equal(together.magnitudes[1:], alone.magnitudes)


def test_columns_of_a_wider_tensor():
    check(drawn(30, 64, torch.float16).to(DEVICE)[:, 7:40], [30])
    check(drawn(30, 64, torch.float16).to(DEVICE).T, [60, 4], copy=False)


def test_nothing_is_nothing():
    assert check(drawn(0, 8, torch.float32).to(DEVICE), [0]).counts.tolist() == [[0, 0]]


@pytest.mark.parametrize("sizes", [[], [3], [5, -1]])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="do not make up"):
        channel_sums(drawn(4, 8, torch.float32), sizes, copy=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "channels"), [(8192, 28672), (16384, 4096), (1, 65536)])
def test_real_shapes_on_a_device(rows, channels):
    x = drawn(rows, channels, torch.bfloat16).to(DEVICE)
    x[rows // 2, channels - 1] = torch.inf
    found = check(x, [rows])
    assert torch.equal(channel_sums(x, [rows], copy=False).magnitudes, found.magnitudes)
