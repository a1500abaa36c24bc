"""Triton code of `group_dot`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def dot_kernel(a_ptr, b_ptr, out_ptr, count, size, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One program: ROWS groups of `size` numbers, one after the other in memory."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    live = row < count
    inside = live[:, None] & (k < size)[None, :]
    at = row[:, None] * size + k[None, :]
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(a * b, 1), mask=live)
