"""GPTQ's files, read by their description; version 2 differs by what a stored zero point means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compressor.formats.second_reader.arrays import (
    Array,
    array,
    bit_stream,
    numbers,
)
from compressor.formats.second_reader.grids import (
    FLOAT_DTYPES,
    DecodedWeight,
    affine,
    group_count,
    group_order,
    known_bits,
)


def reads(config: Mapping[str, Any]) -> bool:
    """Version 1, or what names no version."""
    return config.get("quant_method") == "gptq" and config.get("checkpoint_format") != "gptq_v2"


def decode(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, Array]
) -> DecodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "qweight" not in tensors:
        return None
    marker = config.get("checkpoint_format") or "gptq"
    if marker != "gptq":
        raise ValueError(f"quantization_config.checkpoint_format {marker!r} is not known")
    return stored(config, tensors, shift=1)


def stored(config: Mapping[str, Any], tensors: Mapping[str, Array], *, shift: int) -> DecodedWeight:
    """The weight, whose zero points are stored less `shift`."""
    bits = known_bits(config, "bits", known=(2, 3, 4, 8))
    qweight = array(tensors, "qweight", shape=None, dtypes=("int32",))
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = group_count(config, columns, tensor="qweight")
    qzeros = array(tensors, "qzeros", shape=(groups, rows * bits // 32), dtypes=("int32",))
    scales = numbers(tensors, "scales", shape=(groups, rows), dtypes=FLOAT_DTYPES).T
    codes = bit_stream(qweight.T, bits=bits, count=columns)
    zeros = bit_stream(qzeros, bits=bits, count=rows).T.astype(np.float64) + shift
    order = group_order(tensors, "g_idx", columns, groups=groups)
    return DecodedWeight(affine(codes, zeros, scales, order=order), codes, scales)
