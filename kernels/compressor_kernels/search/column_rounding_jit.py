"""Triton code of `column_rounding`."""

import triton
import triton.language as tl

from compressor_kernels.triton.rounding_jit import e2m1_nearest

NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits below one
FURTHEST = tl.constexpr(1048576.0)  # codes end long before


@triton.jit(do_not_specialize=["rows", "count", "grids"])
def round_kernel(
    left_ptr,
    matrix_ptr,
    groups_ptr,
    scales_ptr,
    zeros_ptr,
    now_ptr,
    codes_ptr,
    errors_ptr,
    rows,
    count,
    grids,
    E2M1: tl.constexpr,
    ZEROS: tl.constexpr,
    DESCENT: tl.constexpr,
    LEVELS: tl.constexpr,
    CENTRE: tl.constexpr,
    LOWEST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS rows of one weight. left, now, codes and errors are [weights, count, rows],
    matrices are [weights, count, count], scales and zeros are [weights, grids, rows]; all dense."""
    weight = tl.program_id(1).to(tl.int64)
    left_ptr += weight * count * rows
    now_ptr += weight * count * rows
    codes_ptr += weight * count * rows
    errors_ptr += weight * count * rows
    matrix_ptr += weight * count * count
    groups_ptr += weight * count
    scales_ptr += weight * grids * rows
    zeros_ptr += weight * grids * rows
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    k = tl.arange(0, WIDTH)
    inside = (k[:, None] < count) & live[None, :]
    left = tl.load(left_ptr + k[:, None].to(tl.int64) * rows + row[None, :], mask=inside, other=0.0)
    for j in range(count):
        at = j * rows + row
        value = tl.sum(tl.where(k[:, None] == j, left, 0.0), 0)
        now = value
        if DESCENT:
            now = tl.load(now_ptr + at, mask=live, other=0.0)
            value = now - value
        group = tl.load(groups_ptr + j)
        scale = tl.load(scales_ptr + group * rows + row, mask=live, other=1.0)
        safe = tl.where(scale == 0, 1.0, scale)
        steps = tl.where(scale == 0, 0.0, value / safe)
        if E2M1:
            magnitude = e2m1_nearest(tl.minimum(tl.abs(steps), 6.0))
            index = tl.where(magnitude <= 2, magnitude * 2, magnitude * 0.5 + 4)
            code = index.to(tl.int32) + tl.where(steps < 0, 8, 0)
            rounded = tl.where(steps < 0, -magnitude, magnitude) * scale
        else:
            zero = tl.full((ROWS,), CENTRE, tl.float32)
            if ZEROS:
                zero = tl.load(zeros_ptr + group * rows + row, mask=live, other=0.0)
            steps = tl.minimum(tl.maximum(steps, -FURTHEST), FURTHEST)
            place = (steps + NEAREST) - NEAREST + zero
            place = tl.minimum(tl.maximum(place, LOWEST), LEVELS)
            code = place.to(tl.int32)
            rounded = (place - zero) * scale
        error = value - rounded
        if DESCENT:
            error = rounded - now
        tl.store(codes_ptr + at, code.to(tl.uint8), mask=live)
        tl.store(errors_ptr + at, error, mask=live)
        weigh = tl.load(matrix_ptr + j * count + k, mask=(k > j) & (k < count), other=0.0)
        left -= weigh[:, None] * error[None, :]
