"""Triton code of `gram_error`: tiles of ΔᵀΔ that meet the Gram matrix while still in registers."""

import triton
import triton.language as tl


@triton.jit
def _halved(tiles, M: tl.constexpr, N: tl.constexpr):
    """Tiles [M, N], each as its left and its right half; nothing moves between threads."""
    halves = ()
    for i in tl.static_range(len(tiles)):
        both = tl.permute(tl.reshape(tiles[i], (M, 2, N // 2)), (0, 2, 1))
        halves = halves + tl.split(both)
    return halves


@triton.jit(do_not_specialize=["grams", "most"])
def gram_kernel(
    left_desc,  # Δ [O, C], of a stack one after the other, in tiles of BK x BM
    right_desc,  # the same Δ in tiles of BK x BN
    gram_ptr,  # fp32 [grams, C, C], of which each is met by every so many-th Δ
    work_ptr,  # int32 [programs, 6]
    out_ptr,  # fp32 [E, most]
    C,
    grams,
    apart,
    stride,
    most,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: one tile of the square, its row and column of tiles given, over the steps of
    Δ's rows from the first given to the last; of which Δ it is, and its number among the programs
    of that one. What tiles have past Δ's edges is read as zeros."""
    work = work_ptr + 6 * tl.program_id(0)
    row = tl.load(work) * BM
    column = tl.load(work + 1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(tl.load(work + 2), tl.load(work + 3)):
        left = left_desc.load([step * BK, row])
        right = right_desc.load([step * BK, column])
        if not ASM:  # the interpreter would multiply bfloat16 as the integers it holds it in
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left.T, right, sums)
    # In eighths, so that registers hold the sums beside what is loaded of the Gram matrix.
    parts = (sums,)
    for i in tl.static_range(3):
        parts = _halved(parts, BM, BN // 2**i)
    WIDE: tl.constexpr = BN // 8
    m = tl.arange(0, BM)[:, None]
    n = tl.arange(0, WIDE)[None, :]
    number = tl.load(work + 4).to(tl.int64)
    corner = gram_ptr + number % grams * apart
    corner += row.to(tl.int64) * stride + column
    met = tl.zeros((BM, WIDE), tl.float32)
    for i in tl.static_range(8):
        first = column + i * WIDE
        at = corner + i * WIDE + (m * stride + n)
        gram = tl.load(at, mask=(m < C - row) & (n < C - first), other=0.0)
        # Once on the diagonal, twice above it, below it not at all.
        diagonal = row - first
        gram = tl.where(n - m < diagonal, 0.0, gram)
        met += parts[i] * tl.where(n - m == diagonal, gram, 2.0 * gram)
    tl.store(out_ptr + number * most + tl.load(work + 5), tl.sum(met))
