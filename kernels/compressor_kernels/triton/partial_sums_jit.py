"""Triton code of `partial_sums`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def reduce_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    M,
    O,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    BN: tl.constexpr,
):
    """fp32 [SPLIT, M, O] to [M, O], summed in order; one program: BN outputs of one token.

    EARLY: the kernel before may still run, and the one after may start.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + (part * M + m) * O + n, mask=n < O, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < O, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * O + n, total.to(out_ptr.dtype.element_ty), mask=n < O)
