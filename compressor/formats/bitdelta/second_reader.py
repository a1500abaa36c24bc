"""A weight as its base and a few signs, each as the files' bytes say them."""

import numpy as np

from compressor.formats.second_reader.arrays import Arrays, Config, Float64, array, numbers
from compressor.formats.second_reader.grids import DecodedWeight

BASE = "base"
"""The base's weight [out, in], float64, which no file of a delta holds."""

READS = {"quant_method": ["bitdelta"]}


def decode(config: Config, module: str, tensors: Arrays) -> DecodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "delta_signs" not in tensors:
        return None
    total: Float64 = tensors[BASE].copy()
    bits = tensors["delta_signs"].shape[0]
    scales = numbers(tensors, "delta_scales", shape=(bits,), dtypes=("float32",))
    shape = (bits, -(-total.shape[1] // 32), total.shape[0])
    signs = array(tensors, "delta_signs", shape=shape, dtypes=("int32",))
    for plane, scale in zip(signs, scales, strict=True):
        raw = np.ascontiguousarray(plane.T).astype("<i4").view(np.uint8)
        ones = np.unpackbits(raw, axis=1, bitorder="little")[:, : total.shape[1]]
        total += np.where(ones == 1, scale, -scale)
    return DecodedWeight(total)
