"""MXFP4 experts of gpt-oss, read by their description."""

import numpy as np

from compressor.formats.second_reader.arrays import Arrays, Config, array
from compressor.formats.second_reader.grids import SIGNED_E2M1, CodedWeight

READS = {"quant_method": ["mxfp4"]}


def decode(config: Config, module: str, tensors: Arrays) -> CodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "blocks" not in tensors:
        return None
    exponents = array(tensors, "scales", shape=None, dtypes=("uint8",))
    rows, groups = exponents.shape
    blocks = array(tensors, "blocks", shape=(rows, groups, 16), dtypes=("uint8",))
    if (exponents == 255).any():
        raise ValueError("scales holds NaN (byte 255)")
    codes = np.empty((rows, groups, 32), np.uint8)
    codes[..., ::2], codes[..., 1::2] = blocks & 15, blocks >> 4
    return CodedWeight(
        codes=codes.reshape(rows, -1),
        values=SIGNED_E2M1,
        scales=np.ldexp(1.0, exponents.astype(np.int64) - 127),
        across=np.repeat(np.arange(groups), 32),
    )
