"""The elementwise part of AWQ's searches (arXiv 2306.00978) in one pass over the weight.

`candidate_delta` gives the error of one candidate scale as the next matrix product wants it;
`clip_bounds` tries every clipping bound of a group, on both grids where zero points write both,
while the group stays in registers. Grids are
    asymmetric  scale = (high − low)/(2^b − 1), zero = clamp(−round(low/scale), 0, 2^b − 1)
                over a range that is widened to hold zero
    symmetric   scale = −extreme/2^(b−1), codes −2^(b−1) … 2^(b−1) − 1
An asymmetric group of one sign, or whose range or scale is tiny or huge, takes the symmetric grid
where that has the smaller error. Grids come
with the scale rounded to the dtype it is stored in before codes are chosen.
"""

import math

import torch
from torch import Tensor

STORED = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
USUAL_RANGE = (2.0**-14, 65504.0)
"""Of a group: narrower or wider ones are tiny or huge."""
TILE, WARPS = 4096, 4
"""Weights that one program of `candidate_delta` works on, and its warps."""
CLIP_TILE, CLIP_WARPS = 8192, 8
"""The same of `clip_bounds`: 64 rows of 128, the fewest that tensor cores read from shared memory
without a copy in registers."""
CLIP_SIZES = (16, 32, 64, 128)
"""Group sizes of `clip_bounds`: a group is one side of a tensor-core tile, and its Gram matrix has
to fit into shared memory."""


def candidate_delta(
    weight: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    stored: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Q(W·s)/s − W, [O, C] bfloat16, computed in float32; or of a stack of weights [E, O, C]; or of
    either for each of several candidates, one after the other [R, ...].

    weight      [O, C] or [E, O, C] float32, float16 or bfloat16, contiguous
    scales      [C] or [E, C] float32, positive; of several candidates [R, ...]
    group_size  inputs that share a grid, None for a whole row
    stored      dtype the grid's scale is rounded to
    out         contiguous bfloat16 of the result's shape to write into
    Raises ValueError for shapes and dtypes that do not fit.
    """
    import triton

    from compressor_kernels.search.awq_candidate_jit import delta_kernel

    size = _checked(weight, bits, group_size, stored)
    one = (*weight.shape[:-2], weight.shape[-1])
    if scales.shape[-len(one) :] != one or scales.dim() > len(one) + 1:
        raise ValueError(f"scales {list(scales.shape)} for {list(weight.shape)}")
    if scales.dtype != torch.float32:
        raise ValueError(f"scales in {scales.dtype}, not float32")
    shape = (*scales.shape[: -len(one)], *weight.shape)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=weight.device)
    if out.shape != shape or out.dtype != torch.bfloat16 or not out.is_contiguous():
        raise ValueError("out is not a contiguous bfloat16 tensor of the result's shape")
    height, width = weight.shape[-2], triton.next_power_of_2(size)
    rows = max(1, TILE // width)
    tiles, count = triton.cdiv(height, rows), math.prod(shape[:-2])
    delta_kernel[(count * tiles * (shape[-1] // size),)](
        weight,
        scales.contiguous(),
        out,
        height,
        shape[-1],
        tiles,
        math.prod(weight.shape[:-2]),
        SIZE=size,
        BITS=bits,
        SYMMETRIC=symmetric,
        STORED=STORED[stored],
        TIMES=weight.is_cuda,
        ROWS=rows,
        WIDTH=width,
        num_warps=WARPS if rows * width <= TILE else 8,
        enable_fp_fusion=False,  # a weight on its code is off by nothing
    )
    return out


def candidate_delta_ref(
    weight: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    stored: torch.dtype,
) -> Tensor:
    """The plain reference of `candidate_delta`."""
    size = _checked(weight, bits, group_size, stored)
    scales = scales.unsqueeze(-2)
    scaled = (weight.float() * scales).unflatten(-1, (-1, size))
    low, high = scaled.aminmax(dim=-1)
    values = _rounded_ref(scaled, low, high, bits=bits, symmetric=symmetric, stored=stored)
    return (values.flatten(-2) / scales - weight.float()).to(torch.bfloat16)


def clip_bounds(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    symmetric: bool,
    stored: torch.dtype,
    grid: int = 20,
    steps: int = 10,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bounds absmax·(1 − i/grid), i < steps, with the least Δ_g G_gg Δ_gᵀ in each group of a row,
    and that error; of asymmetric grids also which groups do better on the symmetric one.

    weight  [O, C] float32, float16 or bfloat16, contiguous; or a stack of weights [E, O, C]
    gram    [C / g, g, g] float32, the diagonal blocks of the inputs' Gram matrix; g in
            `CLIP_SIZES`; of a stack one for each weight, [E, C / g, g, g]
    Returns two of [O, C / g] float32, or [E, O, C / g], and bool or None. Raises ValueError for
    shapes and dtypes that do not fit.
    """
    import triton

    from compressor_kernels.search.awq_candidate_jit import clip_kernel

    size = gram.shape[-1]
    _checked(weight, bits, size, stored)
    groups = weight.shape[-1] // size
    if size not in CLIP_SIZES or gram.shape != (*weight.shape[:-2], groups, size, size):
        raise ValueError(f"gram {list(gram.shape)} for a weight {list(weight.shape)}")
    rows = max(16, CLIP_TILE // size)
    shape = (*weight.shape[:-1], groups)
    bounds, errors = torch.empty((2, *shape), dtype=torch.float32, device=weight.device)
    signed = None if symmetric else torch.empty(shape, dtype=torch.bool, device=weight.device)
    tiles, weights = triton.cdiv(weight.shape[-2], rows), math.prod(weight.shape[:-2])
    clip_kernel[(weights * tiles, groups)](
        weight,
        gram.float().contiguous(),
        bounds,
        errors,
        bounds if signed is None else signed,
        weight.shape[-2],
        weight.shape[-1],
        tiles,
        SIZE=size,
        STEPS=steps,
        GRID=grid,
        BITS=bits,
        SYMMETRIC=symmetric,
        STORED=STORED[stored],
        TIMES=weight.is_cuda,
        ROWS=rows,
        num_warps=CLIP_WARPS,
    )
    return bounds, errors, signed


def clip_bounds_ref(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    symmetric: bool,
    stored: torch.dtype,
    grid: int = 20,
    steps: int = 10,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain reference of `clip_bounds`."""
    groups = weight.float().unflatten(-1, (-1, gram.shape[-1]))
    low, high = groups.aminmax(dim=-1)
    largest = torch.maximum(-low, high)

    def searched(symmetric: bool) -> tuple[Tensor, Tensor]:
        best, least = largest.clone(), torch.full_like(largest, torch.inf)
        for i in range(steps):
            bound = largest * (1 - i / grid)
            values = _rounded_ref(
                groups.clamp(-bound[..., None], bound[..., None]),
                low.clamp(min=-bound),
                high.clamp(max=bound),
                bits=bits,
                symmetric=symmetric,
                stored=stored,
            )
            delta = values - groups
            error = torch.einsum("...rgi,...gij,...rgj->...rg", delta, gram.float(), delta)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, bound, best)
        return best, least

    (best, least), (other, rival) = searched(symmetric), searched(True)
    signed = rival < least
    if symmetric:
        return best, least, None
    return torch.where(signed, other, best), torch.where(signed, rival, least), signed


def _rounded_ref(
    groups: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool, stored: torch.dtype
) -> Tensor:
    """The values that codes stand for, for groups [..., g] with ranges [low, high] [...]."""
    if symmetric:
        return _symmetric_ref(groups, low, high, bits=bits, stored=stored)
    levels = 2**bits - 1
    one_sign = (low >= 0) | (high <= 0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    step = span.clamp(min=1e-5) / levels
    tiny = (span < USUAL_RANGE[0]) | (step < torch.finfo(stored).smallest_normal)
    degenerate = one_sign | tiny | (span > USUAL_RANGE[1])
    scale = _stored_ref(step, stored)[..., None]
    steps = torch.round(groups / scale)
    zero = (-torch.round(low[..., None] / scale)).clamp(0, levels)
    values = ((steps + zero).clamp(0, levels) - zero) * scale
    other = _symmetric_ref(groups, low, high, bits=bits, stored=stored)
    # In units of the extreme, whose square may leave float32.
    extreme = torch.maximum(-low, high).clamp(min=1e-30)[..., None]
    errors = [((v - groups) / extreme).square().sum(-1) for v in (values, other)]
    better = degenerate & (errors[1] < errors[0])
    return torch.where(better[..., None], other, values)


def _symmetric_ref(
    groups: Tensor, low: Tensor, high: Tensor, *, bits: int, stored: torch.dtype
) -> Tensor:
    half = 2 ** (bits - 1)
    scale = _stored_ref(torch.maximum(-low, high).clamp(min=1e-5) / half, stored)
    scale = torch.where(high > -low, -scale, scale)[..., None]
    return torch.round(groups / scale).clamp(-half, half - 1) * scale


def _stored_ref(step: Tensor, stored: torch.dtype) -> Tensor:
    """Positive scales as they will be stored, in float32."""
    info = torch.finfo(stored)
    return step.clamp(max=info.max).to(stored).float().clamp(min=info.smallest_normal * info.eps)


def _checked(weight: Tensor, bits: int, group_size: int | None, stored: torch.dtype) -> int:
    """The size of a group. Raises ValueError for what the kernels do not take."""
    size = weight.shape[-1] if group_size is None else group_size
    if weight.dim() not in (2, 3) or not weight.is_contiguous() or not weight.is_floating_point():
        raise ValueError("the weight is not a contiguous float matrix, nor a stack of them")
    if size < 1 or weight.shape[-1] % size:
        raise ValueError(f"{weight.shape[-1]} inputs do not divide into groups of {size}")
    if not 2 <= bits <= 8 or stored not in STORED:
        raise ValueError(f"no grid of {bits} bits with scales in {stored}")
    return size
