"""Integer quantization: scales and zero points from the range of a group, then codes.

Grid of a group with range [low, high], b bits, as AWQ (arXiv 2306.00978) and its reference code
have it, with round = half to even:
    subtract   scale = (high − low)/(2^b − 1),  zero = clamp(−round(low/scale), 0, 2^b − 1),
               code = clamp(round(w/scale) + zero, 0, 2^b − 1), low ≤ 0 ≤ high
    none       scale = −extreme/2^(b−1), where the extreme is the value of largest magnitude,
               or absmax/(2^(b−1) − 1) if `narrow`,
               code = clamp(round(w/scale), −2^(b−1), 2^(b−1) − 1) + 2^(b−1)
A symmetric grid has one level more on its negative side. The extreme lies exactly on that level,
so the scale is negative where the extreme is positive (the rule of GGML's Q4_0): with absmax/7.5 or
absmax/7 in its place, 4-bit weights lose half a level or more of a grid that has only 16.

Zero is in every grid, which differs from AWQ's code on purpose: there the grid of a group of one
sign spans [low, high] alone, its zero point saturates, and the far end of the group is cut off.
Zero points also write every symmetric grid (zero 2^(b−1), or one less for a negative scale), whose
steps are shorter where a range has about two equal sides: extreme/2 beside (high − low)/3 with 2
bits. Each group takes the symmetric grid if its squared error is smaller, so that no group is worse
off with zero points than without them. AWQ's code has the grids of ranges alone, and so has the
search of its scales here (`from_range`); of those only a group whose range says little about its
values, which are of one sign, tiny or huge, takes the symmetric grid. The search of its bounds has
both, and says which groups take which (`signed`).
A scale is rounded to the dtype it is stored in before zero and codes are chosen from it.
"""

from typing import TypedDict, Unpack

import torch
from compressor_kernels.search.awq_candidate import STORED
from compressor_kernels.search.int_rounding import LARGEST, round_groups
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.numerics.chunks import row_chunks

RANGE_FLOOR = 1e-5
"""Smallest range of a group: an all-zero group gets a small positive scale, never 0/0."""

USUAL_RANGE = (2.0**-14, 65504.0)
"""Ranges beyond these, the ends of float16's normal numbers, are no group's of a trained weight:
scales underflow, saturate or overflow there."""


class GridOptions(TypedDict, total=False):
    """What bends a grid away from its group's range.

    clip_max    [scale_shape] bound of each group: the weight is clamped to ±clip_max first
    clip_min    [scale_shape] lower bound, where it is not −clip_max
    narrow      symmetric grids with a positive scale whose upper end is exactly absmax; of an
                asymmetric spec, the symmetric grids it is compared with
    from_range  of an asymmetric spec, the grids of ranges alone
    signed      [scale_shape] bool, of an asymmetric spec, which groups take the symmetric grid
                whatever its squared error; the others take that of their range
    arithmetic  dtype of the arithmetic (lower than float32 only to reproduce others' codes)
    """

    clip_max: Tensor | None
    clip_min: Tensor | None
    narrow: bool
    from_range: bool
    signed: Tensor | None
    arithmetic: torch.dtype


def quantize_int(weight: Tensor, spec: QuantSpec, **options: Unpack[GridOptions]) -> QTensor:
    """Round a weight [out, in] to the nearest codes of an int spec (tensor, channel or group).

    options  of the grid, see `GridOptions`
    Raises InputError where the spec is not an int affine one or groups do not divide the columns.
    """
    check_int_spec(spec, (weight.shape[0], weight.shape[1]))
    arithmetic, bounds = options.get("arithmetic", torch.float32), clip_of(options)
    if (
        rounded_at_once(weight, spec)
        and arithmetic == torch.float32
        and bounds[1] is None
        and not options.get("narrow")
    ):
        made = round_groups(
            weight,
            bits=spec.bits,
            group_size=spec.group_in(weight.shape[1]),
            symmetric=spec.symmetric,
            stored=spec.scale_dtype,
            bounds=bounds[0],
            signed=options.get("signed"),
            from_range=options.get("from_range", False),
        )
        return QTensor(spec, *made)
    scales, zeros = int_grid(weight, spec, **options)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(weight):
        groups = _grouped(weight[rows].to(arithmetic, copy=True), spec)
        groups = _clamped(groups, rows, *bounds)
        codes[rows] = _codes(groups, spec, rows, scales, zeros).view(codes[rows].shape)
    return QTensor(
        spec=spec,
        codes=codes,
        scales=scales,
        zeros=None if zeros is None else zeros.to(torch.uint8),
    )


def fake_quantize_int(
    weight: Tensor,
    spec: QuantSpec,
    *,
    span: tuple[Tensor, Tensor] | None = None,
    overwrite: bool = False,
    **options: Unpack[GridOptions],
) -> Tensor:
    """`quantize_int(...).dequantize(weight.dtype)`, bit for bit, without the codes in between.

    span       `group_range(weight, spec)`, where it is known
    overwrite  the result may take the place of the weight
    """
    scales, zeros = int_grid(weight, spec, span=span, **options)
    check_int_spec(spec, (weight.shape[0], weight.shape[1]))
    arithmetic, bounds = options.get("arithmetic", torch.float32), clip_of(options)
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    kept = overwrite and weight.is_contiguous()
    out = weight if kept else weight.clone(memory_format=torch.contiguous_format)
    for rows in row_chunks(out):
        chunk = out[rows].to(arithmetic)  # `out` itself, where that is its dtype
        groups = _clamped(_grouped(chunk, spec), rows, *bounds)
        values = _codes(groups, spec, rows, scales, zeros).to(work)
        if zeros is None:
            values.sub_(2 ** (spec.bits - 1))
        else:
            values.sub_(_of_rows(zeros, rows).to(work).unsqueeze(-1))
        values.mul_(_of_rows(scales, rows).to(work).unsqueeze(-1))
        if not (out.dtype == arithmetic == work):
            out[rows] = values.view(chunk.shape).to(out.dtype)
    return out


def nearest_int(
    weight: Tensor,
    spec: QuantSpec,
    *,
    out: Tensor,
    span: tuple[Tensor, Tensor] | None = None,
    clip_max: Tensor | None = None,
) -> Tensor:
    """`fake_quantize_int` from the range, of a group or channel spec, into `out`, which may be the
    weight: float32 and contiguous both. Only a zero may have another sign.

    In fewer passes: rounding keeps order, so that bounds are rounded in place of all that is cut
    off at them, and codes are never made positive.
    """
    scales, zeros = int_grid(weight, spec, span=span, clip_max=clip_max, from_range=True)
    step = scales.to(weight.dtype).unsqueeze(-1)
    zero = torch.full_like(step, 2 ** (spec.bits - 1)) if zeros is None else zeros.unsqueeze(-1)
    lower, upper = -zero, 2**spec.bits - 1 - zero
    if clip_max is not None:
        end = (clip_max.unsqueeze(-1) / step).round_().abs_()
        lower, upper = torch.clamp(-end, lower, upper), torch.clamp(end, lower, upper)
    groups = _grouped(out, spec)
    torch.div(_grouped(weight, spec), step, out=groups).round_()
    torch.minimum(torch.maximum(groups, lower, out=groups), upper, out=groups)
    groups.mul_(step)
    return out


def clip_of(options: GridOptions) -> tuple[Tensor | None, Tensor | None]:
    """Upper and lower bounds of groups."""
    return options.get("clip_max"), options.get("clip_min")


def int_codes(weight: Tensor, scales: Tensor, zeros: Tensor | None, *, spec: QuantSpec) -> Tensor:
    """Nearest codes uint8 on given scales and zero points; all broadcast."""
    centre = 2 ** (spec.bits - 1) if zeros is None else zeros.float()
    steps = (weight.float() / scales.float()).round_() + centre
    return steps.clamp_(0, 2**spec.bits - 1).to(torch.uint8)


def int_grid(
    weight: Tensor,
    spec: QuantSpec,
    *,
    span: tuple[Tensor, Tensor] | None = None,
    **options: Unpack[GridOptions],
) -> tuple[Tensor, Tensor | None]:
    """Scales [scale_shape] in spec.scale_dtype, and integer zeros [scale_shape] in `arithmetic`.

    Options as in `fake_quantize_int`; zeros are None for symmetric specs.
    """
    check_int_spec(spec, (weight.shape[0], weight.shape[1]))
    clip = clip_max, clip_min = clip_of(options)
    narrow, arithmetic = options.get("narrow", False), options.get("arithmetic", torch.float32)
    low, high = group_range(weight, spec) if span is None else span
    low, high = low.to(arithmetic), high.to(arithmetic)
    if clip_max is not None:
        upper = clip_max.to(arithmetic)
        lower = -upper if clip_min is None else clip_min.to(arithmetic)
        low = torch.minimum(torch.maximum(low, lower), upper)
        high = torch.minimum(torch.maximum(high, lower), upper)
    if spec.zero == "none":
        return symmetric_scales(low, high, spec, narrow=narrow), None
    grid, degenerate = asymmetric_grid(low, high, spec)
    signed = options.get("signed")
    of_ranges = options.get("from_range", False) or signed is not None
    judged = not of_ranges or bool(degenerate.any())
    if not judged and signed is None:
        return grid
    other = with_zeros(symmetric_scales(low, high, spec, narrow=narrow), spec)
    better = torch.zeros_like(degenerate)
    if judged:
        errors = [_squared_errors(weight, spec, *g, clip, arithmetic) for g in (grid, other)]
        better = (errors[1] < errors[0]) | errors[0].isinf()
    if of_ranges:
        better &= degenerate
    if signed is not None:
        better |= signed
    return torch.where(better, other[0], grid[0]), torch.where(
        better, other[1].to(low.dtype), grid[1]
    )


def with_zeros(scales: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Symmetric grids of signed scales as positive scales and zero points of the same shape.

    A negative scale mirrors the codes: −(c − centre) = (levels − c) − (levels − centre).
    """
    levels, centre = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    return scales.abs(), torch.where(scales < 0, levels - centre, centre)


def symmetric_scales(low: Tensor, high: Tensor, spec: QuantSpec, *, narrow: bool) -> Tensor:
    """Scales in spec.scale_dtype of symmetric grids for ranges [low, high]; negative where the
    extreme is positive, unless `narrow`."""
    absmax = torch.maximum(-low, high).clamp(min=RANGE_FLOOR)
    if narrow:
        return storable(absmax / (2 ** (spec.bits - 1) - 1), spec.scale_dtype)
    scales = storable(absmax / 2 ** (spec.bits - 1), spec.scale_dtype)
    return torch.where(high > -low, -scales, scales)


def asymmetric_grid(
    low: Tensor, high: Tensor, spec: QuantSpec
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Scales in spec.scale_dtype and integer zeros in low's dtype for ranges [low, high], zero
    included; and where the range says little: one sign, tiny, or huge."""
    levels = 2**spec.bits - 1
    one_sign = (low >= 0) | (high <= 0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    step = span.clamp(min=RANGE_FLOOR) / levels
    scales = storable(step, spec.scale_dtype)
    zeros = torch.round(low / scales.to(low.dtype)).neg_().clamp_(0, levels)
    tiny = (span < USUAL_RANGE[0]) | (step < torch.finfo(spec.scale_dtype).smallest_normal)
    huge = span > USUAL_RANGE[1]
    return (scales, zeros), (one_sign | tiny | huge) & (span > 0)


def _squared_errors(
    weight: Tensor,
    spec: QuantSpec,
    scales: Tensor,
    zeros: Tensor,
    clip: tuple[Tensor | None, Tensor | None],
    arithmetic: torch.dtype,
) -> Tensor:
    """Squared error of each group [scale_shape] float64 on an asymmetric grid."""
    errors = torch.zeros(scales.shape, dtype=torch.float64, device=weight.device)
    for rows in row_chunks(weight):
        groups = _clamped(_grouped(weight[rows].to(arithmetic, copy=True), spec), rows, *clip)
        values = _codes(groups.clone(), spec, rows, scales, zeros).float()
        values.sub_(_of_rows(zeros, rows).float().unsqueeze(-1))
        values.mul_(_of_rows(scales, rows).float().unsqueeze(-1))
        found = (values.double() - groups.double()).square_().sum(-1)
        if spec.strategy == "tensor":
            errors += found.sum()
        else:
            errors[rows] = found
    return errors


def group_range(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, [scale_shape] in the weight's dtype."""
    if spec.strategy == "tensor":
        low, high = torch.aminmax(weight)
        return low.view(1, 1), high.view(1, 1)
    groups = _grouped(weight, spec)
    return groups.amin(-1), groups.amax(-1)


def check_int_spec(spec: QuantSpec, shape: tuple[int, int]) -> None:
    """Raises InputError unless a weight of this shape can take the spec."""
    if spec.element != "int" or spec.zero == "offset" or spec.second != "none":
        raise InputError("not a plain integer spec", hint=f"got {spec}")
    if spec.strategy == "block":
        raise InputError("integer weights have no block scales", hint="use group or channel")
    if spec.strategy == "group" and (not spec.group_size or shape[1] % spec.group_size):
        raise InputError(
            f"{shape[1]} inputs do not divide into groups of {spec.group_size}",
            hint="choose a group size that divides every targeted linear's inputs",
        )


def is_plain_int(spec: QuantSpec) -> bool:
    """Whether the spec is integers with one scale per group or row, chosen from the range."""
    return (
        spec.element == "int"
        and spec.second == "none"
        and spec.zero != "offset"
        and spec.strategy in ("group", "channel")
    )


def rounded_at_once(weight: Tensor, spec: QuantSpec) -> bool:
    """Whether one kernel rounds a weight to its spec."""
    fits = 0 < spec.group_in(weight.shape[-1]) <= LARGEST
    floats = weight.dtype in STORED and spec.scale_dtype in STORED
    return weight.is_cuda and is_plain_int(spec) and floats and fits


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to their storage dtype, kept positive and finite."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    return scales.clamp(max=info.max).to(dtype).clamp_(min=smallest)


def _codes(
    groups: Tensor, spec: QuantSpec, rows: slice, scales: Tensor, zeros: Tensor | None
) -> Tensor:
    """Codes 0 … 2^bits − 1 of grouped weights [rows, n, g], as numbers; overwrites `groups`."""
    steps = groups.div_(_of_rows(scales, rows).to(groups.dtype).unsqueeze(-1)).round_()
    if zeros is None:
        steps.add_(2 ** (spec.bits - 1))
    else:
        steps.add_(_of_rows(zeros, rows).unsqueeze(-1))
    return steps.clamp_(0, 2**spec.bits - 1)


def _clamped(
    groups: Tensor, rows: slice, clip_max: Tensor | None, clip_min: Tensor | None
) -> Tensor:
    """Grouped weights [rows, n, g] clamped to their bounds, in place."""
    if clip_max is not None:
        upper = _of_rows(clip_max, rows).to(groups.dtype).unsqueeze(-1)
        lower = -upper
        if clip_min is not None:
            lower = _of_rows(clip_min, rows).to(groups.dtype).unsqueeze(-1)
        torch.minimum(torch.maximum(groups, lower, out=groups), upper, out=groups)
    return groups


def _grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A view [rows, n, g] with what shares a scale last; one group a row unless groups are set."""
    size = spec.group_in(weight.shape[1])
    return weight.reshape(weight.shape[0], -1, size)


def _of_rows(per_group: Tensor, rows: slice) -> Tensor:
    """The grid entries of some rows; a per-tensor grid has one entry for all."""
    return per_group if per_group.shape[0] == 1 else per_group[rows]
