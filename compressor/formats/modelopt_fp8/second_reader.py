"""ModelOpt's FP8 checkpoints, read by their description."""

from __future__ import annotations

from compressor.formats.second_reader.arrays import Arrays, Config, array, e4m3, numbers
from compressor.formats.second_reader.grids import DecodedWeight

READS = {"quant_method": ["modelopt"], "quant_algo": ["FP8"]}


def decode(config: Config, module: str, tensors: Arrays) -> DecodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "weight_scale" not in tensors:
        return None
    raw = array(tensors, "weight", shape=None, dtypes=("uint8",))
    scale = numbers(tensors, "weight_scale", shape=(), dtypes=("float32",))
    weight = e4m3(raw)
    weight *= scale
    return DecodedWeight(weight, raw, scale.reshape(1, 1))
