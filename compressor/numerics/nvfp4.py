"""NVFP4: E2M1 elements, an E4M3 scale per 16 inputs and one float32 scale per tensor.

With A the absmax of the tensor (or of all that share its global scale) and a rule's largest element
M4 and largest scale M8, all in float32 and in this order:
    divisor = (M4·M8)/A,   second = 1/divisor
    scale = E4M3(absmax_block/M4 · divisor)
    element = E2M1(w · (1/(second·scale))), round half to even
Four Over Six (arXiv 2512.02010) makes a second candidate with E4M3(1.5 · absmax_block/6 · divisor),
which puts the block's largest value on 4 instead of 6, and keeps the one with the smaller error.
Its M8 is 256, because 256 · 1.5 still is an E4M3 number. The choice shows in the scale alone.

Elements saturate at 6 and scales at 448, as the hardware's conversion does. The published code
does not: where a scale is subnormal and was rounded down, a quotient of 7 or more becomes code 8,
which decodes to zero.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import NVFP4, QTensor, QuantSpec
from compressor.numerics.chunks import row_chunks

Rule = Literal["static_6", "static_4", "mse", "mae", "abs_max"]
"""How a block's scale is chosen: its largest value becomes 6, becomes 4, or whichever of the two
makes the smaller squared, absolute or largest error."""

BLOCK = 16
SCALE_MAX = 448.0
DIVISOR_MAX = 2.0**110
"""Keeps 1/(second·scale) finite for tensors of almost nothing, which become zeros."""


def full_range(rule: Rule) -> float:
    """M4·M8: the largest value before the global scale. A calibrated absmax divided by it is the
    static scale of an input."""
    return {"static_6": 6.0 * 448.0, "static_4": 4.0 * 448.0}.get(rule, 6.0 * 256.0)


def shared_absmax(weights: Sequence[Tensor]) -> Tensor:
    """Absmax [1, 1] float32 of all weights: the `amax` of linears that runtimes fuse into one
    matrix (q/k/v, gate/up), which has one global scale."""
    return torch.stack([weight.abs().amax().float() for weight in weights]).amax().reshape(1, 1)


class RoundingOptions(TypedDict, total=False):
    """How a weight is rounded.

    rule       how a block's scale is chosen ("static_6")
    amax       absmax that sets the global scale, from `shared_absmax`; the weight's own if None
    tile_rows  rows that share a block's scale: 1, or 16 so that the transposed weight has the same
               codes; the scale is repeated for each row
    clip_max   [out, in/16] bound of each block: the weight is clamped to ±clip_max first
    """

    rule: Rule
    amax: Tensor | None
    tile_rows: int
    clip_max: Tensor | None


def quantize_nvfp4(
    weight: Tensor, spec: QuantSpec = NVFP4, **options: Unpack[RoundingOptions]
) -> QTensor:
    """Round a weight [out, in] to NVFP4.

    options  see `RoundingOptions`
    Raises InputError where inputs do not divide by 16 or the absmax is not finite.
    """
    rule = options.get("rule", "static_6")
    amax, divisor = _global(weight, spec, rule=rule, amax=options.get("amax"))
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(
        weight.shape[0], weight.shape[1] // BLOCK, dtype=spec.scale_dtype, device=weight.device
    )
    for rows, values, chosen in _rounded(weight, amax, rule, options):
        codes[rows] = e2m1_codes(values)
        scales[rows] = chosen
    return QTensor(spec=spec, codes=codes, scales=scales, second=1 / divisor)


def _rounded(
    weight: Tensor, amax: Tensor, rule: Rule, options: RoundingOptions
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time: which, their elements, and their blocks' scales."""
    tile_rows = options.get("tile_rows", 1)
    for rows in row_chunks(weight, multiple=tile_rows):
        part = weight[rows].float()
        if (clip_max := options.get("clip_max")) is not None:
            bound = clip_max[rows].float().repeat_interleave(BLOCK, dim=1)
            part = torch.minimum(torch.maximum(part, -bound), bound)
        yield rows, *_round(part, amax, rule, tile_rows)


def fake_quantize_nvfp4(
    weight: Tensor, spec: QuantSpec = NVFP4, **options: Unpack[RoundingOptions]
) -> Tensor:
    """`quantize_nvfp4(...).dequantize(weight.dtype)`, bit for bit, without the codes in between."""
    rule = options.get("rule", "static_6")
    amax, divisor = _global(weight, spec, rule=rule, amax=options.get("amax"))
    out = torch.empty_like(weight)
    for rows, values, chosen in _rounded(weight, amax, rule, options):
        blocks = values.view(values.shape[0], -1, BLOCK) * chosen.float().unsqueeze(-1)
        out[rows] = blocks.mul_(1 / divisor).view(values.shape).to(weight.dtype)
    return out


def nvfp4_codes(weight: Tensor, scales: Tensor, second: Tensor) -> Tensor:
    """Nearest E2M1 codes on given scales; all three broadcast (a column with its scales, say)."""
    return e2m1_codes(round_e2m1(_quotient(weight.float(), scales.float(), second)))


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest of ±{0, .5, 1, 1.5, 2, 3, 4, 6}: ties to the even code, beyond 6 to 6.

    A negative value that rounds to zero becomes −0; an exact zero of either sign becomes +0.
    """
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return magnitude.div_(step).round_().mul_(step).clamp_(max=6).mul_(values.sign())


def e2m1_codes(values: Tensor) -> Tensor:
    """uint8 codes sign<<3 | index of E2M1 values; −0 keeps its sign, as in other writers."""
    magnitude = values.abs()
    index = torch.where(magnitude <= 2, magnitude * 2, (magnitude / 2).floor_() + 4)
    return index.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def _global(
    weight: Tensor, spec: QuantSpec, *, rule: Rule, amax: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The absmax and the divisor it makes, both [1, 1] float32."""
    if weight.shape[1] % BLOCK:
        raise InputError(f"{weight.shape[1]} inputs do not divide into blocks of {BLOCK}")
    if (spec.strategy, spec.group_size) != ("group", BLOCK):
        raise InputError(f"NVFP4 has a scale per {BLOCK} inputs", hint=f"got {spec}")
    amax = shared_absmax([weight]) if amax is None else amax.float().reshape(1, 1)
    if not bool(torch.isfinite(amax)):
        raise InputError("the weight holds NaN or infinity")
    return amax, global_divisor(amax, rule)


def global_divisor(amax: Tensor, rule: Rule = "static_6") -> Tensor:
    """One over the global scale [1, 1] that follows from the absmax [1, 1] float32 of a matrix."""
    # A number over a tensor would be its reciprocal times the number, which rounds twice.
    divisor = torch.full_like(amax, full_range(rule)) / amax
    return torch.where(amax == 0, 1.0, divisor.clamp(max=DIVISOR_MAX))


def _round(weight: Tensor, amax: Tensor, rule: Rule, tile_rows: int) -> tuple[Tensor, Tensor]:
    """E2M1 values [rows, in] in float32 and E4M3 scales [rows, in/16] of some rows."""
    rows, columns = weight.shape
    blocks = _blocks(weight, tile_rows)
    divisor = global_divisor(amax, rule)
    top = 4.0 if rule == "static_4" else 6.0
    steps = blocks.abs().amax(-1, keepdim=True) / top * divisor
    scales = _e4m3(steps)
    values = round_e2m1(_quotient(blocks, scales.float(), 1 / divisor))
    if rule not in ("static_6", "static_4"):
        other_scales = _e4m3(steps * 1.5)
        other = round_e2m1(_quotient(blocks, other_scales.float(), 1 / divisor))
        four, six = (
            _error(v * s.float() * amax / full_range(rule) - blocks, rule)
            for v, s in ((other, other_scales), (values, scales))
        )
        better = four < six  # a tie keeps 6, and so does a block of zeros
        values = torch.where(better, other, values)
        scales = torch.where(better, other_scales.float(), scales.float()).to(scales.dtype)
    per_row = scales.squeeze(-1).repeat_interleave(tile_rows, dim=0)[:rows]
    tiles = values.view(*values.shape[:2], tile_rows, BLOCK).transpose(1, 2)
    return tiles.reshape(-1, columns)[:rows], per_row


def _error(difference: Tensor, rule: Rule) -> Tensor:
    if rule == "mse":
        return difference.square_().sum(-1, keepdim=True)
    if rule == "mae":
        return difference.abs_().sum(-1, keepdim=True)
    return difference.abs_().amax(-1, keepdim=True)


def _quotient(weight: Tensor, scales: Tensor, second: Tensor) -> Tensor:
    """What is rounded to E2M1; 0 where the block's scale is 0."""
    return torch.where(scales == 0, 0.0, weight * (1 / (second * scales)))


def _e4m3(scales: Tensor) -> Tensor:
    return scales.clamp(max=SCALE_MAX).to(torch.float8_e4m3fn)


def _blocks(weight: Tensor, tile_rows: int) -> Tensor:
    """[rows / tile_rows, in/16, tile_rows·16]; missing rows are zeros."""
    if tile_rows == 1:
        return weight.reshape(weight.shape[0], -1, BLOCK)
    missing = -weight.shape[0] % tile_rows
    if missing:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, missing))
    tiles = weight.reshape(-1, tile_rows, weight.shape[1] // BLOCK, BLOCK).transpose(1, 2)
    return tiles.reshape(tiles.shape[0], tiles.shape[1], -1)
