"""Triton code of `grid_sums`."""

import triton
import triton.language as tl

NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits below one
FURTHEST = tl.constexpr(1048576.0)  # codes end long before


@triton.jit(do_not_specialize=["count", "period"])
def sums_kernel(
    groups_ptr,
    counts_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    count,
    period,
    size,
    ZEROS: tl.constexpr,
    CENTRE: tl.constexpr,
    LOWEST: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS groups of `size` weights, one after the other in memory."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    live = row < count
    inside = live[:, None] & (k < size)[None, :]
    groups = tl.load(groups_ptr + row[:, None] * size + k[None, :], mask=inside, other=0.0)
    at = (row % period)[:, None] * size + k[None, :]
    counts = tl.load(counts_ptr + at, mask=inside, other=0.0)
    scale = tl.load(scales_ptr + row, mask=live, other=1.0)
    zero = tl.full((ROWS,), CENTRE, tl.float32)
    if ZEROS:
        zero = tl.load(zeros_ptr + row, mask=live, other=0.0)
    steps = groups / tl.where(scale == 0, 1.0, scale)[:, None]
    steps = tl.minimum(tl.maximum(steps, -FURTHEST), FURTHEST)
    place = (steps + NEAREST) - NEAREST + zero[:, None]
    place = tl.minimum(tl.maximum(place, LOWEST), LEVELS)
    steps = place - zero[:, None]
    off = steps * scale[:, None] - groups
    weighed = steps * counts
    error = tl.where(scale == 0, float("inf"), tl.sum(off * off * counts, 1))
    tl.store(out_ptr + row, error, mask=live)
    tl.store(out_ptr + count + row, tl.sum(weighed * groups, 1), mask=live)
    tl.store(out_ptr + 2 * count.to(tl.int64) + row, tl.sum(weighed * steps, 1), mask=live)
