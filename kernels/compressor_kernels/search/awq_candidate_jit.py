"""Triton code of `awq_candidate`: weight groups on integer grids, in registers all the way."""

import triton
import triton.language as tl

RANGE_FLOOR = tl.constexpr(1e-5)
TINY, HUGE = tl.constexpr(2.0**-14), tl.constexpr(65504.0)  # ranges; awq_candidate's USUAL_RANGE
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits below 1
LARGEST = tl.constexpr(1048576.0)


@triton.jit
def _nearest(x):
    """x rounded half to even, |x| <= 2^20 (more is cut off: codes end long before)."""
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    return (x + ROUND) - ROUND


@triton.jit
def _over(x, scale, STORED: tl.constexpr):
    """x / scale, to the last bit where scales are stored in float32: of a range that is clipped to
    +-b the scale is 2b / levels then, and -b, b and the zero point lie half-way between codes."""
    if STORED == "float32":
        return tl.div_rn(x, scale)
    return x / scale


@triton.jit
def _storable(scale, STORED: tl.constexpr):
    """A positive scale as it will be stored, in float32."""
    if STORED == "float16":
        scale = tl.minimum(scale, 65504.0).to(tl.float16).to(tl.float32)
        return tl.maximum(scale, 5.9604644775390625e-08)  # the smallest float16: never 0
    if STORED == "bfloat16":
        # By hand, to nearest even: the interpreter's cast cuts the low bits off.
        word = scale.to(tl.int32, bitcast=True)
        word = (word + 0x7FFF + ((word >> 16) & 1)) & -65536
        return word.to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _symmetric(w, low, high, BITS: tl.constexpr, STORED: tl.constexpr):
    """The values of w [R, G] on the symmetric grid of each row's range [low, high] [R]."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    scale = _storable(tl.maximum(tl.maximum(-low, high), RANGE_FLOOR) / HALF, STORED)
    scale = tl.where(high > -low, -scale, scale)
    steps = _nearest(w / scale[:, None])
    return tl.minimum(tl.maximum(steps, -HALF), HALF - 1) * scale[:, None]


@triton.jit
def _asymmetric(w, low, high, BITS: tl.constexpr, STORED: tl.constexpr):
    """The same on the asymmetric grid, which holds zero; a group of one sign, or whose range
    or scale is tiny or huge, takes the symmetric grid where that has the smaller error."""
    LEVELS: tl.constexpr = 2**BITS - 1
    SMALLEST: tl.constexpr = 6.103515625e-05 if STORED == "float16" else 1.1754943508222875e-38
    one_sign = (low >= 0) | (high <= 0)
    low = tl.minimum(low, 0.0)
    high = tl.maximum(high, 0.0)
    step = tl.maximum(high - low, RANGE_FLOOR)
    step = _over(step, tl.full(step.shape, LEVELS, tl.float32), STORED)
    scale = _storable(step, STORED)
    steps = _nearest(_over(w, tl.broadcast_to(scale[:, None], w.shape), STORED))
    zero = tl.minimum(tl.maximum(-_nearest(_over(low, scale, STORED)), 0.0), LEVELS)[:, None]
    values = (tl.minimum(tl.maximum(steps + zero, 0.0), LEVELS) - zero) * scale[:, None]
    tiny = (high - low < TINY) | (step < SMALLEST)
    degenerate = one_sign | tiny | (high - low > HUGE)
    if tl.max(degenerate.to(tl.int32), 0) > 0:  # rare: the usual tile pays for one grid only
        other = _symmetric(w, low, high, BITS, STORED)
        # In units of the extreme, whose square may leave float32.
        extreme = tl.maximum(tl.maximum(-low, high), 1e-30)[:, None]
        error = (values - w) / extreme
        rival = (other - w) / extreme
        better = degenerate & (tl.sum(rival * rival, 1) < tl.sum(error * error, 1))
        values = tl.where(better[:, None], other, values)
    return values


@triton.jit
def _rounded(w, low, high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, STORED: tl.constexpr):
    """The values that codes stand for: w [R, G] on the grid of each row's range [low, high] [R].

    STORED names the dtype the scale is rounded to before codes are chosen.
    """
    if SYMMETRIC:
        return _symmetric(w, low, high, BITS, STORED)
    else:
        return _asymmetric(w, low, high, BITS, STORED)


@triton.jit(do_not_specialize=["groups", "per_row", "per_weight", "of_all"])
def delta_kernel(
    w_ptr,
    s_ptr,
    out_ptr,
    groups,
    per_row,
    per_weight,
    of_all,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS groups of SIZE weights. W and out are dense: groups follow each other,
    those of a row, and those of each weight of a stack, `of_all` in all; out has these once for
    each candidate. Scales are one row for each weight, of one candidate after the other."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    inside = (group[:, None] < groups) & (j[None, :] < SIZE)
    at = group[:, None] * SIZE + j[None, :]
    number = group // per_weight
    w_at = (group % of_all)[:, None] * SIZE + j[None, :]
    w = tl.load(w_ptr + w_at, mask=inside, other=0.0).to(tl.float32)
    column = (number * per_row + group % per_row)[:, None] * SIZE + j[None, :]
    s = tl.load(s_ptr + column, mask=inside, other=1.0)
    scaled = w * s
    low = tl.min(tl.where(inside, scaled, float("inf")), 1)
    high = tl.max(tl.where(inside, scaled, float("-inf")), 1)
    delta = _rounded(scaled, low, high, BITS, SYMMETRIC, STORED) / s - w
    tl.store(out_ptr + at, delta.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def clip_kernel(
    w_ptr,
    gram_ptr,
    bound_ptr,
    error_ptr,
    rows,
    columns,
    tiles,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: one group of ROWS output rows of one weight, which has `rows` of them in `tiles`
    programs. gram is [weights, groups, SIZE, SIZE], dense."""
    weight = tl.program_id(0).to(tl.int64) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    live = row < rows
    row += weight * rows
    gram_ptr += weight * (columns // SIZE) * (SIZE * SIZE)
    j = tl.arange(0, SIZE)
    at = row[:, None] * columns + group * SIZE + j[None, :]
    w = tl.load(w_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    gram = tl.load(gram_ptr + group * (SIZE * SIZE) + j[:, None] * SIZE + j[None, :])
    low = tl.min(w, 1)
    high = tl.max(w, 1)
    largest = tl.maximum(-low, high)
    best = largest
    least = tl.full((ROWS,), float("inf"), tl.float32)
    for i in range(STEPS):
        bound = largest * (1.0 - i / GRID)
        below = tl.maximum(low, -bound)
        above = tl.minimum(high, bound)
        clipped = tl.minimum(tl.maximum(w, -bound[:, None]), bound[:, None])
        delta = _rounded(clipped, below, above, BITS, SYMMETRIC, STORED) - w
        error = tl.sum(tl.dot(delta, gram, input_precision="tf32") * delta, 1)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, bound, best)
    place = row * (columns // SIZE) + group
    tl.store(bound_ptr + place, best, mask=live)
    tl.store(error_ptr + place, least, mask=live)
