"""AutoAWQ's GEMM layout, read by its description."""

import numpy as np
from numpy.typing import NDArray

from compressor.formats.second_reader.arrays import Array, Arrays, Config, array, numbers
from compressor.formats.second_reader.grids import (
    FLOAT_DTYPES,
    CodedWeight,
    group_count,
    known_bits,
)

AWQ_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)

READS = {"quant_method": ["awq"]}


def decode(config: Config, module: str, tensors: Arrays) -> CodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "qweight" not in tensors:
        return None
    known_bits(config, "bits", known=(4,))
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"quantization_config.version {config['version']!r} is not known")
    qweight = array(tensors, "qweight", shape=None, dtypes=("int32",))
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    groups = group_count(config, columns, tensor="qweight")
    qzeros = array(tensors, "qzeros", shape=(groups, rows // 8), dtypes=("int32",))
    scales = numbers(tensors, "scales", shape=(groups, rows), dtypes=FLOAT_DTYPES).T

    def nibbles(words: Array) -> NDArray[np.uint8]:
        # By bytes, each of which holds two: words are four times as much to go through.
        turned = np.ascontiguousarray(words.T).astype("<i4", copy=False)
        pairs = turned.view(np.uint8).reshape(*turned.shape, 4)
        found = np.empty((turned.shape[0] * 8, turned.shape[1]), dtype=np.uint8)
        for number in range(4):
            pair = np.ascontiguousarray(pairs[..., number])
            found[AWQ_NIBBLE_OF_OUTPUT.index(2 * number) :: 8] = pair & 15
            found[AWQ_NIBBLE_OF_OUTPUT.index(2 * number + 1) :: 8] = pair >> 4
        return found

    codes, zeros = nibbles(qweight), nibbles(qzeros).astype(np.float64)
    order = np.arange(columns) * groups // columns
    return CodedWeight(codes=codes, zeros=zeros, scales=scales, across=order)
