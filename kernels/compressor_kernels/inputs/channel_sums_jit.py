"""Triton code of `channel_sums`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def finite_kernel(
    x_ptr, good_ptr, rows, channels, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program: whether ROWS rows are finite."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    finite = tl.full((ROWS, COLUMNS), 1, tl.int32)
    for first in range(0, channels, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = live[:, None] & (column < channels)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
        # Not so of NaN.
        finite = finite & (tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32)
    tl.store(good_ptr + row, tl.min(finite, 1).to(tl.int1), mask=live)


@triton.jit
def sums_kernel(
    x_ptr,
    good_ptr,
    work_ptr,
    copied_ptr,
    counts_ptr,
    sums_ptr,
    channels,
    stride,
    plane,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: sums of COLUMNS channels over at most ROWS rows of one place."""
    work = work_ptr + tl.program_id(0) * 3
    first, last, number = tl.load(work), tl.load(work + 1), tl.load(work + 2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < channels
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    most = tl.zeros((STEP, COLUMNS), tl.float32)
    finite = tl.zeros((STEP,), tl.int32)
    for start in range(0, ROWS, STEP):
        row = first.to(tl.int64) + start + tl.arange(0, STEP)
        live = row < last
        good = tl.load(good_ptr + row, mask=live, other=0) != 0
        inside = live[:, None] & known[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
        x = tl.where(good[:, None], x, 0.0).to(x.dtype)
        if copied_ptr is not None:
            tl.store(copied_ptr + row[:, None] * channels + column[None, :], x, mask=inside)
        magnitude = tl.abs(x.to(tl.float32))
        total += magnitude
        most = tl.maximum(most, magnitude)
        finite += good.to(tl.int32)
    sums_ptr += number.to(tl.int64) * channels + column
    tl.store(sums_ptr, tl.sum(total, 0), mask=known)
    tl.store(sums_ptr + plane, tl.max(most, 0), mask=known)
    if tl.program_id(1) == 0:
        counted = tl.sum(finite, 0)
        tl.store(counts_ptr + number * 2, counted.to(tl.int64))
        tl.store(counts_ptr + number * 2 + 1, (last - first - counted).to(tl.int64))
