"""MXFP4 and MXFP8 weights in files: E8M0 scales are bytes there, read as what they are or as uint8.

gpt-oss stacks its experts: codes uint8 [experts, out, in/32, 16], the even input in the low half of
a byte, and scales uint8 [experts, out, in/32]. Rows of its gate_up_proj are gate and up by turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.shared.checks import describe
from compressor.formats.shared.e2m1 import pack_nibbles, unpack_nibbles
from compressor.ir.qtensor import E8M0, MXFP4, QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec

BLOCK = 32
INPUTS = {element: ActivationSpec(element, "mx", BLOCK) for element in ("fp4_e2m1", "fp8_e4m3")}
"""Inputs of the kind that goes with weights of an element."""


def take_exponents(
    tensors: Mapping[str, Tensor], name: str, *, spec: QuantSpec, shape: tuple[int, int]
) -> Tensor:
    """E8M0 scales of a weight [out, in]; InputError where they do not fit or one is NaN (255)."""
    scales = tensors.get(name)
    if scales is None:
        raise InputError(f"tensor {name!r} is missing")
    expected = spec.scale_shape(*shape)
    if scales.dtype not in (torch.uint8, E8M0) or tuple(scales.shape) != expected:
        raise InputError(f"tensor {name!r} is {describe(scales)}, not uint8 {list(expected)}")
    return _exponents(scales, name)


def gptoss_experts(blocks: Tensor, scales: Tensor) -> list[QTensor]:
    """The stacked codes and scales of one projection as a weight [out, in] of each expert."""
    fits = blocks.dim() == 4 and blocks.shape[-1] * 2 == BLOCK and blocks.dtype == torch.uint8
    if not fits or scales.shape != blocks.shape[:-1] or scales.dtype not in (torch.uint8, E8M0):
        raise InputError(
            f"blocks {describe(blocks)} and scales {describe(scales)} are not uint8 [experts, out, "
            f"in/{BLOCK}, {BLOCK // 2}] and [experts, out, in/{BLOCK}]"
        )
    return [
        QTensor(MXFP4, unpack_nibbles(codes).flatten(1), _exponents(exponents, "scales"))
        for codes, exponents in zip(blocks, scales, strict=True)
    ]


def gptoss_tensors(experts: Sequence[QTensor]) -> tuple[Tensor, Tensor]:
    """The inverse of `gptoss_experts`: blocks and scales."""
    blocks = [pack_nibbles(q.codes).view(q.shape[0], -1, BLOCK // 2) for q in experts]
    return torch.stack(blocks), torch.stack([q.scales.view(torch.uint8) for q in experts])


def rows_by_turns(q: QTensor) -> tuple[QTensor, QTensor]:
    """Gate and up of an expert's gate_up_proj, whose rows alternate."""
    gate, up = (QTensor(q.spec, q.codes[i::2], q.scales[i::2]) for i in (0, 1))
    return gate, up


def _exponents(scales: Tensor, name: str) -> Tensor:
    found = scales.contiguous().view(torch.uint8)
    if bool((found == 255).any()):
        raise InputError(f"tensor {name!r} holds NaN (byte 255)")
    return found.view(E8M0)
