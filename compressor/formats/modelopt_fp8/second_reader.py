"""ModelOpt's FP8 checkpoints, read by their description."""

import numpy as np

from compressor.formats.second_reader.arrays import Arrays, Config, array, e4m3, numbers
from compressor.formats.second_reader.grids import CodedWeight

READS = {"quant_method": ["modelopt"], "quant_algo": ["FP8"]}


def decode(config: Config, module: str, tensors: Arrays) -> CodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "weight_scale" not in tensors:
        return None
    raw = array(tensors, "weight", shape=None, dtypes=("uint8",))
    scale = numbers(tensors, "weight_scale", shape=(), dtypes=("float32",))
    return CodedWeight(
        codes=raw,
        values=e4m3(np.arange(256)),
        scales=scale.reshape(1, 1),
        across=np.zeros(raw.shape[1], np.int64),
    )
