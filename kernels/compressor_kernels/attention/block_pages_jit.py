"""Triton code of `block_pages`: bounds of pages, and a query's upper bound over a page."""

import triton
import triton.language as tl

from compressor_kernels.triton.lengths_jit import text_length


@triton.jit
def bound_kernel(
    k_ptr,  # [B, G, T, D]
    low_ptr,  # [B, G, pages, D], dense
    high_ptr,
    len_ptr,  # [B] or None
    k_len,
    pages,
    groups,
    k_b,
    k_g,
    k_t,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    length = text_length(len_ptr, lane // groups, k_len)
    page = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dim = tl.arange(0, BLOCK_D)
    base = k_ptr + lane // groups * k_b + lane % groups * k_g + dim[None, :]
    low = tl.full([BLOCK_P, BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_P, BLOCK_D], float("-inf"), tl.float32)
    for i in range(PAGE):
        token = page.to(tl.int64) * PAGE + i
        live = (token < length)[:, None] & (dim < D)[None, :]
        k = tl.load(base + token[:, None] * k_t, mask=live, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(live, k, float("inf")))
        high = tl.maximum(high, tl.where(live, k, float("-inf")))
    at = (lane * pages + page)[:, None] * D + dim[None, :]
    mask = (page < pages)[:, None] & (dim < D)[None, :]
    tl.store(low_ptr + at, low.to(low_ptr.dtype.element_ty), mask=mask)
    tl.store(high_ptr + at, high.to(high_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _worth(scores, soft, SOFT: tl.constexpr):
    """Of pages, from the scores of their logical pages; none where no logical page is real."""
    best = tl.max(scores, 1)
    if SOFT:
        there = tl.where(best == float("-inf"), 0.0, best)
        total = tl.sum(tl.math.exp2(soft * (scores - there[:, None])), 1)
        best += tl.math.log2(total) / soft
    return best


@triton.jit
def page_kernel(
    q_ptr,  # [B, H, 1, D]
    low_ptr,  # [B, G, pages, D]
    high_ptr,
    out_ptr,  # [B, H or G, pages of PER_PAGE] fp32
    pages,
    groups,
    q_b,
    q_h,
    low_b,
    low_g,
    low_p,
    high_b,
    high_g,
    high_p,
    soft,  # holds log2(e)
    GROUP: tl.constexpr,
    GROUP_MAX: tl.constexpr,
    SOFT: tl.constexpr,
    PER_PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    b = lane // groups
    g = lane % groups
    page = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    dim = tl.arange(0, BLOCK_D)
    row = page.to(tl.int64)[:, None]
    mask = (page < pages)[:, None] & (dim < D)[None, :]
    low_at = low_ptr + b * low_b + g * low_g + row * low_p + dim[None, :]
    high_at = high_ptr + b * high_b + g * high_g + row * high_p + dim[None, :]
    low = tl.load(low_at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(high_at, mask=mask, other=0.0).to(tl.float32)
    wide = tl.cdiv(pages, PER_PAGE)
    physical = tl.program_id(0) * (BLOCK_P // PER_PAGE) + tl.arange(0, BLOCK_P // PER_PAGE)
    best = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for member in tl.static_range(GROUP):
        q_at = q_ptr + b * q_b + (g * GROUP + member) * q_h + dim
        q = tl.load(q_at, mask=dim < D, other=0.0).to(tl.float32)[None, :]
        scores = tl.sum(tl.maximum(q * low, q * high), 1)
        scores = tl.where(page < pages, scores, float("-inf"))
        if GROUP_MAX:
            best = tl.maximum(best, scores)
        else:
            scores = _worth(tl.reshape(scores, [BLOCK_P // PER_PAGE, PER_PAGE]), soft, SOFT)
            out = out_ptr + (lane * GROUP + member) * wide + physical
            tl.store(out, scores, mask=physical < wide)
    if GROUP_MAX:
        best = _worth(tl.reshape(best, [BLOCK_P // PER_PAGE, PER_PAGE]), soft, SOFT)
        tl.store(out_ptr + lane * wide + physical, best, mask=physical < wide)
