"""ModelOpt's FP8 checkpoints, read by their description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.formats.second_reader.arrays import (
    Array,
    array,
    e4m3,
    numbers,
)
from compressor.formats.second_reader.grids import (
    DecodedWeight,
)


def reads(config: Mapping[str, Any]) -> bool:
    """By `quant_method` and `quant_algo`."""
    return config.get("quant_method") == "modelopt" and config.get("quant_algo") == "FP8"


def decode(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, Array]
) -> DecodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "weight_scale" not in tensors:
        return None
    raw = array(tensors, "weight", shape=None, dtypes=("uint8",))
    scale = numbers(tensors, "weight_scale", shape=(), dtypes=("float32",))
    weight = e4m3(raw)
    weight *= scale
    return DecodedWeight(weight, raw, scale.reshape(1, 1))
