"""FP8 in blocks, read by its description."""

import numpy as np

from compressor.formats.second_reader.arrays import Arrays, Config, array, e4m3, numbers
from compressor.formats.second_reader.grids import DecodedWeight, ceil

READS = {"quant_method": ["fp8"]}


def decode(config: Config, module: str, tensors: Arrays) -> DecodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "weight_scale_inv" not in tensors:
        return None
    raw = array(tensors, "weight", shape=None, dtypes=("uint8",))
    rows, columns = (int(n) for n in config["weight_block_size"])
    shape = (ceil(raw.shape[0], rows), ceil(raw.shape[1], columns))
    scales = numbers(tensors, "weight_scale_inv", shape=shape, dtypes=("float32",))
    spread = np.repeat(np.repeat(scales, rows, axis=0), columns, axis=1)
    weight = e4m3(raw) * spread[: raw.shape[0], : raw.shape[1]]
    return DecodedWeight(weight, raw, scales)
