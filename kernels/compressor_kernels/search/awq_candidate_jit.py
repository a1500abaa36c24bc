"""Triton code of `awq_candidate`: weight groups on integer grids, in registers all the way.

A weight costs a dozen instructions here: divisions are products with a reciprocal that are mended
to the last bit, and what is clipped at a bound takes the bound's code, since rounding keeps order.
"""

import triton
import triton.language as tl

RANGE_FLOOR = tl.constexpr(1e-5)
TINY, HUGE = tl.constexpr(2.0**-14), tl.constexpr(65504.0)  # ranges; awq_candidate's USUAL_RANGE
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits below 1
LARGEST = tl.constexpr(1048576.0)


@triton.jit
def _whole(x):
    """x rounded half to even, |x| <= 2^22."""
    return (x + ROUND) - ROUND


@triton.jit
def _nearest(x):
    """x rounded half to even; more than 2^20 is cut off: codes end long before."""
    return _whole(tl.minimum(tl.maximum(x, -LARGEST), LARGEST))


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
def _inverse(scale):
    """1 / scale, to the last bit."""
    about = 1.0 / scale
    return tl.fma(tl.fma(-about, scale, 1.0), about, about)


@triton.jit
def _over(x, scale, inverse):
    """x / scale to the last bit, as the quantizer divides: many a weight lies half-way between two
    codes. `inverse` is that of scale."""
    about = x * inverse
    return tl.fma(tl.fma(-about, scale, x), inverse, about)


@triton.jit
def _off(w, scale, inverse, lower, upper):
    """What w [R, G] is off on a grid with this step [R], of which there are the whole numbers of
    steps from lower to upper [R]."""
    scale = scale[:, None]
    steps = _over(w, scale, inverse[:, None])
    steps = _whole(tl.minimum(tl.maximum(steps, lower[:, None]), upper[:, None]))
    return steps * scale - w


@triton.jit
def _symmetric(w, low, high, bound, BITS: tl.constexpr, STORED: tl.constexpr):
    """What w [R, G] is off on the symmetric grid of each row's range [low, high] [R], where weights
    are clipped at bound [R]."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    scale = _storable(tl.maximum(tl.maximum(-low, high), RANGE_FLOOR) * (1.0 / HALF), STORED)
    inverse = _inverse(scale)
    end = _whole(tl.minimum(_over(bound, scale, inverse), HALF))
    # A positive extreme lies on the lowest code, too: its scale is negative.
    mirrored = high > -low
    scale, inverse = tl.where(mirrored, -scale, scale), tl.where(mirrored, -inverse, inverse)
    return _off(w, scale, inverse, -end, tl.minimum(end, HALF - 1))


@triton.jit
def _unusual(low, high, shrunk, BITS: tl.constexpr, STORED: tl.constexpr):
    """Rows of one sign, or whose range is tiny or huge, or tiny when shrunk so much."""
    SMALLEST: tl.constexpr = 6.103515625e-05 if STORED == "float16" else 1.1754943508222875e-38
    span = tl.maximum(high, 0.0) - tl.minimum(low, 0.0)
    tiny = (span * shrunk < TINY) | (span * shrunk < SMALLEST * (2**BITS - 1))
    return ((low >= 0) | (high <= 0) | tiny | (span > HUGE)) & (span > 0)


@triton.jit
def _asymmetric(
    w, low, high, bound, rare, BITS: tl.constexpr, STORED: tl.constexpr, TIMES: tl.constexpr
):
    """The same on the asymmetric grid, which holds zero; a row that is `_unusual` takes the
    symmetric grid where that has the smaller error. `rare` says whether there may be such a row."""
    LEVELS: tl.constexpr = 2**BITS - 1
    below = tl.minimum(low, 0.0)
    step = tl.maximum(tl.maximum(high, 0.0) - below, RANGE_FLOOR)
    # PyTorch divides by a number with its reciprocal on a GPU.
    step = step * (1.0 / LEVELS) if TIMES else step / LEVELS
    scale = _storable(step, STORED)
    inverse = _inverse(scale)
    zero = -_whole(tl.maximum(_over(below, scale, inverse), -LEVELS))
    end = _whole(tl.minimum(_over(bound, scale, inverse), LEVELS))
    lower, upper = tl.maximum(-end, -zero), tl.minimum(end, LEVELS - zero)
    delta = _off(w, scale, inverse, lower, upper)
    if rare:  # the usual tile pays for one grid only
        other = _symmetric(w, low, high, bound, BITS, STORED)
        cut = w - tl.minimum(tl.maximum(w, -bound[:, None]), bound[:, None])
        # In units of the extreme, whose square may leave float32.
        extreme = tl.maximum(tl.maximum(-low, high), 1e-30)[:, None]
        error = (delta + cut) / extreme
        rival = (other + cut) / extreme
        better = tl.sum(rival * rival, 1) < tl.sum(error * error, 1)
        better = better & _unusual(low, high, 1.0, BITS, STORED)
        delta = tl.where(better[:, None], other, delta)
    return delta


@triton.jit(do_not_specialize=["rows", "tiles", "weights"])
def delta_kernel(
    w_ptr,
    s_ptr,
    out_ptr,
    rows,
    columns,
    tiles,
    weights,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    TIMES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: one group of ROWS output rows of one weight under one candidate. Of `weights`
    weights each has `rows` of them in `tiles` programs. W, scales and out are dense; scales and out
    have all weights once for each candidate."""
    groups = columns // SIZE
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    number = (tile // tiles).to(tl.int64)
    row = tile % tiles * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (j < SIZE)[None, :]
    at = row[:, None].to(tl.int64) * columns + (group * SIZE + j)[None, :]
    area = rows.to(tl.int64) * columns
    w = tl.load(w_ptr + number % weights * area + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + number * columns + group * SIZE + j, mask=j < SIZE, other=1.0)
    scaled = w * s[None, :]
    low = tl.min(tl.where((j < SIZE)[None, :], scaled, float("inf")), 1)
    high = tl.max(tl.where((j < SIZE)[None, :], scaled, float("-inf")), 1)
    bound = tl.maximum(-low, high)
    if SYMMETRIC:
        delta = _symmetric(scaled, low, high, bound, BITS, STORED)
    else:
        rare = tl.max(_unusual(low, high, 1.0, BITS, STORED).to(tl.int32), 0) > 0
        delta = _asymmetric(scaled, low, high, bound, rare, BITS, STORED, TIMES)
    delta = delta * (1.0 / s)[None, :]
    tl.store(out_ptr + number * area + at, delta.to(tl.bfloat16), mask=inside)


@triton.jit
def _searched(
    w,
    gram,
    low,
    high,
    STEPS: tl.constexpr,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    RARE: tl.constexpr,
    STORED: tl.constexpr,
    TIMES: tl.constexpr,
):
    """Best bounds and their errors on grids of ranges, where they are not all symmetric, and on
    symmetric ones, [R] each."""
    largest = tl.maximum(-low, high)
    best, signed_best = largest, largest
    least = tl.full(largest.shape, float("inf"), tl.float32)
    signed_least = least
    for i in range(STEPS):
        bound = largest * (1.0 - i / GRID)
        below = tl.maximum(low, -bound)
        above = tl.minimum(high, bound)
        delta = _symmetric(w, below, above, bound, BITS, STORED)
        error = tl.sum(tl.dot(delta, gram, input_precision="tf32") * delta, 1)
        better = error < signed_least
        signed_least = tl.where(better, error, signed_least)
        signed_best = tl.where(better, bound, signed_best)
        if not SYMMETRIC:
            delta = _asymmetric(w, below, above, bound, RARE, BITS, STORED, TIMES)
            error = tl.sum(tl.dot(delta, gram, input_precision="tf32") * delta, 1)
            better = error < least
            least = tl.where(better, error, least)
            best = tl.where(better, bound, best)
    return best, least, signed_best, signed_least


@triton.jit(do_not_specialize=["rows", "tiles"])
def clip_kernel(
    w_ptr,
    gram_ptr,
    bound_ptr,
    error_ptr,
    signed_ptr,
    rows,
    columns,
    tiles,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    TIMES: tl.constexpr,
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
    shrunk: tl.constexpr = 1 - STEPS / GRID
    rare = tl.max(_unusual(low, high, shrunk, BITS, STORED).to(tl.int32), 0) > 0
    # A loop of its own for each, so that the usual one has the registers to itself.
    if SYMMETRIC:
        found = _searched(w, gram, low, high, STEPS, GRID, BITS, True, False, STORED, TIMES)
    elif rare:
        found = _searched(w, gram, low, high, STEPS, GRID, BITS, False, True, STORED, TIMES)
    else:
        found = _searched(w, gram, low, high, STEPS, GRID, BITS, False, False, STORED, TIMES)
    best, least, signed_best, signed_least = found
    place = row * (columns // SIZE) + group
    signed = signed_least < least
    if not SYMMETRIC:
        tl.store(signed_ptr + place, signed, mask=live)
    tl.store(bound_ptr + place, tl.where(signed, signed_best, best), mask=live)
    tl.store(error_ptr + place, tl.where(signed, signed_least, least), mask=live)
