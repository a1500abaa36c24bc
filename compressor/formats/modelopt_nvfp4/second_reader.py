"""ModelOpt's NVFP4 checkpoints, read by their description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.formats.second_reader.arrays import (
    Array,
    numbers,
)
from compressor.formats.second_reader.grids import (
    DecodedWeight,
    nvfp4,
)


def reads(config: Mapping[str, Any]) -> bool:
    """By `quant_method` and `quant_algo`."""
    return config.get("quant_method") == "modelopt" and config.get("quant_algo") in (
        "NVFP4",
        "W4A16_NVFP4",
    )


def decode(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, Array]
) -> DecodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "weight_scale" not in tensors:
        return None
    multiplier = numbers(tensors, "weight_scale_2", shape=(), dtypes=("float32",))
    return nvfp4(tensors, "weight", multiplier=float(multiplier))
