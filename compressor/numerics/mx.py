"""MXFP4 and MXFP8 (OCP Microscaling Formats 1.0): E2M1 or E4M3 elements that share a power of two
with 31 neighbours.

With absmax = m·2^e of a group, 1 ≤ m < 2, and T·2^t the largest element (1.5·2² or 1.75·2⁸):
    scale = 2^k, stored as the byte k + 127;  element = round(w / scale), saturating
    floor    k = e − t                           the specification's rule: m > T saturates
    ceil     k = e − t, one more where m > T     nothing saturates (ModelOpt's rule)
    nearest  k = e − t, one more where m ≥ 1.75  compressed-tensors' rule
    mse      floor or ceil, whichever makes the smaller squared error in the group
Readers never choose k again, so all four are the same format. Up to m = T they agree, and no
exponent in between makes less error: the grid of 2^(k+1) is a part of that of 2^k. Scales are
chosen in float32 whatever the weight's dtype; compressed-tensors takes them in float16 for float16
weights, where small groups become zero.
"""

from typing import Literal

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.qtensor import E8M0, MXFP4, MXFP8, NVFP4, QTensor, QuantSpec, decode_elements
from compressor.numerics.chunks import row_chunks
from compressor.numerics.fp8 import fp8_codes
from compressor.numerics.nvfp4 import e2m1_codes, round_e2m1

Rule = Literal["floor", "ceil", "nearest", "mse"]

BLOCK = 32
BIAS = 127
LARGEST = {"fp4_e2m1": (2, 1.5), "fp8_e4m3": (8, 1.75)}
"""t and T of the largest element T·2^t."""
EXPONENTS = {"fp4_e2m1": 125, "fp8_e4m3": 119}
"""The largest k: one more would make the largest element infinite in float32 and bfloat16."""
NVFP4_EXPONENTS = 17
"""Powers of two that E4M3 scales hold beside their largest, 2^8: down to 2^-9."""


def quantize_mx(
    weight: Tensor,
    spec: QuantSpec,
    *,
    rule: Rule = "nearest",
    clip_max: Tensor | None = None,
) -> QTensor:
    """Round a weight [out, in] to MXFP4 or MXFP8, as the spec says.

    clip_max  [out, in/32] bound of each group: the weight is clamped to ±clip_max first
    Raises InputError for another spec, where inputs do not divide by 32 and for NaN or infinity.
    """
    if spec not in (MXFP4, MXFP8):
        raise InputError("not a microscaling spec", hint=f"got {spec}")
    if weight.shape[1] % BLOCK:
        raise InputError(f"{weight.shape[1]} inputs do not divide into groups of {BLOCK}")
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(
        weight.shape[0], weight.shape[1] // BLOCK, dtype=torch.uint8, device=weight.device
    )
    for rows in row_chunks(weight):
        groups = _grouped(weight[rows].float())
        if clip_max is not None:
            bound = clip_max[rows].float().unsqueeze(-1)
            groups = torch.minimum(torch.maximum(groups, -bound), bound)
        chosen = _scales(groups, spec, rule)
        codes[rows] = mx_codes(groups, chosen.unsqueeze(-1), spec).flatten(1)
        scales[rows] = chosen.view(torch.uint8)
    return QTensor(spec=spec, codes=codes, scales=scales.view(E8M0))


def fake_quantize_mx_inputs(x: Tensor, spec: QuantSpec) -> Tensor:
    """Inputs [..., channels] as their MXFP4 or MXFP8 form stands for them, float32.

    The rule is `nearest`. Raises InputError where channels do not divide by 32.
    """
    if x.shape[-1] % BLOCK:
        raise InputError(f"{x.shape[-1]} inputs do not divide into groups of {BLOCK}")
    groups = _grouped(x.float())
    scales = _scales(groups, spec, "nearest").unsqueeze(-1)
    codes = mx_codes(groups, scales, spec)
    return decode_elements(codes, spec, torch.float32).mul_(scales.float()).flatten(-2)


def mx_codes(weight: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """Nearest codes on given E8M0 scales; the two broadcast. Ties go to the even code."""
    scales = scales.float()
    if spec.element == "fp8_e4m3":
        return fp8_codes(weight, scales)
    return e2m1_codes(round_e2m1(weight.float() / scales))


def nvfp4_of_mxfp4(q: QTensor, *, largest: int | None = None) -> QTensor:
    """The same weight in NVFP4, exactly: codes stay, and each power of two becomes two E4M3 scales.

    largest  exponent of the largest scale among weights that share a global scale; its own if None
    With it on E4M3's 2^8, exponents down to 17 below have a form. Raises InputError where a group
    with values lies lower, and for a weight that is not MXFP4.
    """
    if q.spec != MXFP4:
        raise InputError("only MXFP4 becomes NVFP4 without a change", hint=f"got {q.spec}")
    exponents = q.scales.view(torch.uint8).to(torch.int32) - BIAS
    filled = _filled(q)
    if largest is None:
        largest = largest_exponent(q)
    lost = int((filled & (exponents < largest - NVFP4_EXPONENTS)).sum())
    if lost:
        raise InputError(
            f"{lost} of {filled.numel()} groups have a scale more than 2^{NVFP4_EXPONENTS} below "
            "the largest, which NVFP4's block scales do not reach",
            hint="quantize the original with nvfp4, or leave this weight in MXFP4",
        )
    steps = (exponents - (largest - 8)).clamp(-9, 8)
    scales = torch.ldexp(torch.ones_like(steps, dtype=torch.float32), steps)
    second = torch.ldexp(torch.ones(1, 1, device=q.codes.device), torch.tensor(largest - 8))
    if float(second) == 0 or not bool(torch.isfinite(1 / second)):
        raise InputError(f"the global scale 2^{largest - 8} has no float32 or no reciprocal")
    return QTensor(
        spec=NVFP4,
        codes=q.codes,
        scales=scales.repeat_interleave(BLOCK // 16, dim=1).to(torch.float8_e4m3fn),
        second=second,
    )


def largest_exponent(q: QTensor) -> int:
    """Of the scales of an MXFP4 or MXFP8 weight's groups that hold a value; 0 where none does."""
    exponents = q.scales.view(torch.uint8).to(torch.int32) - BIAS
    filled = _filled(q)
    return int(exponents[filled].max()) if bool(filled.any()) else 0


def _grouped(values: Tensor) -> Tensor:
    return values.reshape(*values.shape[:-1], -1, BLOCK)


def _filled(q: QTensor) -> Tensor:
    """Groups [out, in/32] that hold a value which is not zero."""
    mask = 7 if q.spec.element == "fp4_e2m1" else 127
    return _grouped((q.codes & mask) != 0).any(-1)


def _scales(groups: Tensor, spec: QuantSpec, rule: Rule) -> Tensor:
    """E8M0 scales [...] of float32 groups [..., 32]; byte 0, the smallest, for zeros alone."""
    absmax = groups.abs().amax(-1)
    if not bool(absmax.isfinite().all()):
        raise InputError("the weight holds NaN or infinity")
    top, mantissa = LARGEST[spec.element]
    half, exponent = torch.frexp(absmax)  # absmax = half·2^exponent, ½ ≤ half < 1
    floor = torch.where(absmax == 0, -BIAS, exponent - 1 - top)
    ceil = floor + (half * 2 > mantissa)
    most = EXPONENTS[spec.element]
    if rule == "floor":
        chosen = floor
    elif rule == "ceil":
        chosen = ceil
    elif rule == "nearest":
        chosen = floor + (half * 2 >= 1.75)
    else:
        errors = [_squared_error(groups, _stored(k, most), spec) for k in (floor, ceil)]
        chosen = torch.where(errors[1] < errors[0], ceil, floor)
    return _stored(chosen, most)


def _stored(exponents: Tensor, most: int) -> Tensor:
    return (exponents.clamp(-BIAS, most) + BIAS).to(torch.uint8).view(E8M0)


def _squared_error(groups: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """In units of the scale, which both candidates of a group are taken to by one factor."""
    spread = scales.unsqueeze(-1)
    values = decode_elements(mx_codes(groups, spread, spec), spec, torch.float64)
    return (values * spread.double() - groups.double()).square_().sum(-1)
