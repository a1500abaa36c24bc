"""Version 2 of GPTQ's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.formats.gptq.second_reader import stored
from compressor.formats.second_reader.arrays import (
    Array,
)
from compressor.formats.second_reader.grids import (
    DecodedWeight,
)


def reads(config: Mapping[str, Any]) -> bool:
    """By `quant_method` and `checkpoint_format`."""
    return config.get("quant_method") == "gptq" and config.get("checkpoint_format") == "gptq_v2"


def decode(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, Array]
) -> DecodedWeight | None:
    """The weight, or None where it is stored as floats."""
    return stored(config, tensors, shift=0) if "qweight" in tensors else None
