"""Groups of weights rounded to integer grids of their ranges, and how far off they are then.

`round_groups` finds scale, zero point and codes of each group in one pass over the weights; grids
    asymmetric  scale = (high − low)/(2^b − 1), zero = clamp(−round(low/scale), 0, 2^b − 1)
                over a range that is widened to hold zero
    symmetric   scale = −extreme/2^(b−1), codes −2^(b−1) … 2^(b−1) − 1
of which an asymmetric group takes the one with the smaller squared error; with `from_range` only if
it is of one sign, or its range or scale is tiny or huge. `rounding_errors` gives what products with
a Gram matrix are made of, `group_values` what codes stand for. All give the bits that the same
steps in PyTorch give on a GPU, where a division by a number is a product with its reciprocal.
"""

import torch
from torch import Tensor

from compressor_kernels.search.awq_candidate import STORED, USUAL_RANGE

TILE, WARPS = 4096, 4
"""Weights that a program works on, and its warps."""
LARGEST = 4096
"""Weights of a group at most."""


def round_groups(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    stored: torch.dtype,
    bounds: Tensor | None = None,
    signed: Tensor | None = None,
    from_range: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 [O, C], scales [O, groups] in `stored`, and zero points uint8, None for symmetric
    grids.

    weight      [O, C] float32, float16 or bfloat16
    group_size  inputs that share a grid, at most `LARGEST`
    bounds      [O, groups] at which weights are clipped first
    signed      [O, groups] bool, which asymmetric groups take the symmetric grid whatever its
                error; the others take that of their range, as with `from_range`
    Raises ValueError for shapes and dtypes that do not fit.
    """
    import triton

    from compressor_kernels.search.int_rounding_jit import rounding_kernel

    _check(weight, bits, group_size, stored)
    shape = weight.shape[0], weight.shape[1] // group_size
    if any(x is not None and x.shape != shape for x in (bounds, signed)):
        raise ValueError(f"bounds or signs that are not {list(shape)}")
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(shape, dtype=stored, device=weight.device)
    zeros = None if symmetric else torch.empty(shape, dtype=torch.uint8, device=weight.device)
    info, width = torch.finfo(stored), triton.next_power_of_2(group_size)
    rows = max(1, TILE // width)
    rounding_kernel[(triton.cdiv(scales.numel(), rows),)](
        weight.contiguous(),
        codes if bounds is None else bounds.contiguous(),
        codes if signed is None else signed.contiguous(),
        codes,
        scales,
        codes if zeros is None else zeros,
        scales.numel(),
        INVERSE=1 / (2**bits - 1),
        MOST=info.max,
        SMALLEST=info.smallest_normal,
        SIZE=group_size,
        BITS=bits,
        SYMMETRIC=symmetric,
        BOUND=bounds is not None,
        SIGNED=signed is not None,
        JUDGED=not from_range and signed is None,
        STORED=STORED[stored],
        ROWS=rows,
        WIDTH=width,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return codes, scales, zeros


def round_groups_ref(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    stored: torch.dtype,
    bounds: Tensor | None = None,
    signed: Tensor | None = None,
    from_range: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain reference of `round_groups`."""
    _check(weight, bits, group_size, stored)
    levels, half, info = 2**bits - 1, 2 ** (bits - 1), torch.finfo(stored)
    groups = weight.float().view(len(weight), -1, group_size)
    if bounds is not None:
        groups = groups.clamp(-bounds[..., None], bounds[..., None])
    low, high = groups.aminmax(dim=-1)

    def scale_of(step: Tensor) -> Tensor:
        return step.clamp(max=info.max).to(stored).clamp(min=info.smallest_normal * info.eps)

    def codes_of(scale: Tensor, zero: Tensor) -> Tensor:
        steps = torch.round(groups / scale.float()[..., None]) + zero[..., None]
        return steps.clamp(0, levels)

    def error_of(scale: Tensor, zero: Tensor) -> Tensor:
        values = (codes_of(scale, zero) - zero[..., None]) * scale.float()[..., None]
        return (values.double() - groups.double()).square().sum(-1)

    other, mirrored = scale_of(torch.maximum(-low, high).clamp(min=1e-5) / half), high > -low
    if symmetric:
        scale, zero = torch.where(mirrored, -other, other), torch.full_like(low, half)
        return codes_of(scale, zero).to(torch.uint8).view(weight.shape), scale, None
    degenerate = (low >= 0) | (high <= 0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    step = span.clamp(min=1e-5) * (1 / levels)
    scale = scale_of(step)
    zero = (-torch.round(low / scale.float())).clamp(0, levels)
    degenerate |= (span < USUAL_RANGE[0]) | (step < info.smallest_normal) | (span > USUAL_RANGE[1])
    centre = torch.where(mirrored, levels - half, half).float()
    errors = error_of(scale, zero), error_of(other, centre)
    better = (errors[1] < errors[0]) | errors[0].isinf()
    if from_range or signed is not None:
        better &= degenerate & (span > 0)
    if signed is not None:
        better |= signed
    scale, zero = torch.where(better, other, scale), torch.where(better, centre, zero)
    codes = codes_of(scale, zero).to(torch.uint8).view(weight.shape)
    return codes, scale, zero.to(torch.uint8)


def rounding_errors(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    by: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Q/by − W/by and W/by, bfloat16 [E, O, C], of a stack of weights and what codes stand for.

    weight  [E, O, C] float32, float16 or bfloat16
    codes   uint8 [E·O, C];  scales, zeros  [E·O, groups], as `round_groups` gives them
    by      [C] or [E, C] float32, what inputs were multiplied with
    Raises ValueError for shapes and dtypes that do not fit.
    """
    import triton

    from compressor_kernels.search.int_rounding_jit import errors_kernel

    count, height, width = weight.shape
    _check(weight.flatten(0, 1), bits, group_size, scales.dtype)
    shape = count * height, width // group_size
    fits = codes.shape == (shape[0], width) and scales.shape == shape
    fits = fits and (zeros is None or zeros.shape == shape)
    if not fits or (by is not None and by.shape not in ((width,), (count, width))):
        raise ValueError(f"codes, scales or divisors that do not fit {list(weight.shape)}")
    delta, before = torch.empty((2, *weight.shape), dtype=torch.bfloat16, device=weight.device)
    block = triton.next_power_of_2(group_size)
    rows = max(1, TILE // block)
    errors_kernel[(triton.cdiv(scales.numel(), rows),)](
        weight.contiguous(),
        codes.contiguous(),
        scales.contiguous(),
        codes if zeros is None else zeros.contiguous(),
        codes if by is None else by.float().contiguous(),
        delta,
        before,
        scales.numel(),
        shape[1],
        height * shape[1] if by is not None and by.dim() == 2 else 0,
        SIZE=group_size,
        CENTRE=2 ** (bits - 1),
        ZEROS=zeros is not None,
        BY=by is not None,
        ROWS=rows,
        WIDTH=block,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return delta, before


def rounding_errors_ref(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    by: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain reference of `rounding_errors`."""
    zero = 2.0 ** (bits - 1) if zeros is None else zeros.float()[..., None]
    steps = codes.float().view(len(codes), -1, group_size) - zero
    new, old = (steps * scales.float()[..., None]).view(weight.shape), weight.float()
    if by is not None:
        new, old = new / by[..., None, :], old / by[..., None, :]
    return (new - old).to(torch.bfloat16), old.to(torch.bfloat16)


def group_values(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, dtype: torch.dtype
) -> Tensor:
    """What codes stand for, [O, C] in `dtype`, computed in float32.

    codes  uint8 [O, C];  scales, zeros  [O, groups], as `round_groups` gives them
    Raises ValueError for shapes and dtypes that do not fit.
    """
    import triton

    from compressor_kernels.search.int_rounding_jit import values_kernel

    size = codes.shape[1] // max(scales.shape[1], 1)
    fits = scales.shape == (len(codes), codes.shape[1] // max(size, 1))
    if not fits or (zeros is not None and zeros.shape != scales.shape):
        raise ValueError(f"scales or zero points that do not fit {list(codes.shape)}")
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _check(out, bits, size, scales.dtype)
    width = triton.next_power_of_2(size)
    rows = max(1, TILE // width)
    values_kernel[(triton.cdiv(scales.numel(), rows),)](
        codes.contiguous(),
        scales.contiguous(),
        codes if zeros is None else zeros.contiguous(),
        out,
        scales.numel(),
        SIZE=size,
        CENTRE=2 ** (bits - 1),
        ZEROS=zeros is not None,
        ROWS=rows,
        WIDTH=width,
        num_warps=WARPS,
    )
    return out


def _check(weight: Tensor, bits: int, group_size: int, stored: torch.dtype) -> None:
    if weight.dim() != 2 or weight.dtype not in STORED:
        raise ValueError("the weight is not a matrix in float32, float16 or bfloat16")
    if not 0 < group_size <= LARGEST or weight.shape[1] % group_size:
        raise ValueError(f"{weight.shape[1]} inputs do not divide into groups of {group_size}")
    if not 2 <= bits <= 8 or stored not in STORED:
        raise ValueError(f"no grid of {bits} bits with scales in {stored}")
