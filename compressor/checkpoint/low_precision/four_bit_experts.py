"""Experts of 4 bits among FP8 weights, two codes a byte, the even input in the low half.

DeepSeek V4    X.weight int8 [out, in/2] of E2M1 codes, X.scale E8M0 [out, in/32]
SGLang W4AFP8  X.weight int8 [out, in/2] signed, X.weight_scale_inv floats [out, in/128]
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.checkpoint.low_precision.base import FLOATS, Stored
from compressor.checkpoint.safetensors import Entry
from compressor.formats.shared.e2m1 import unpack_nibbles
from compressor.formats.shared.mx import take_exponents
from compressor.ir.layout import is_weight
from compressor.ir.qtensor import E8M0, MXFP4, QTensor

GROUP = 128
SCALES = ("scale", "weight_scale_inv")


def four_bit_experts(entries: Mapping[str, Entry]) -> dict[str, Stored]:
    """Every such weight with its scale, by its name."""
    found = {}
    for name, entry in entries.items():
        shape = entry.spec.shape
        if entry.spec.dtype != torch.int8 or len(shape) != 2 or not is_weight(name):
            continue
        path, (rows, half) = name.rpartition(".")[0], shape
        for scale in (f"{path}.{leaf}" for leaf in SCALES):
            spec = entries[scale].spec if scale in entries else None
            parts = {"weight": name, "scale": scale}
            if spec is None:
                continue
            if spec.dtype in (E8M0, torch.uint8) and spec.shape == (rows, half // 16):
                found[name] = Stored(parts, (rows, 2 * half), _e2m1)
            elif spec.dtype in FLOATS and spec.shape == (rows, 2 * half // GROUP):
                found[name] = Stored(parts, (rows, 2 * half), _integers)
    return found


def _e2m1(parts: Mapping[str, Tensor]) -> Tensor:
    codes = unpack_nibbles(parts["weight"].view(torch.uint8))
    shape = (codes.shape[0], codes.shape[1])
    scales = take_exponents(parts, "scale", spec=MXFP4, shape=shape)
    return QTensor(MXFP4, codes, scales).dequantize(torch.float32)


def _integers(parts: Mapping[str, Tensor]) -> Tensor:
    codes = unpack_nibbles(parts["weight"].view(torch.uint8)).to(torch.int8)
    signed = (codes ^ 8) - 8
    return signed.float() * parts["scale"].float().repeat_interleave(GROUP, dim=1)
