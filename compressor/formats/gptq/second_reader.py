"""GPTQ's files, read by their description; version 2 differs by what a stored zero point means."""

import numpy as np

from compressor.formats.second_reader.arrays import Arrays, Config, array, bit_stream, numbers
from compressor.formats.second_reader.grids import (
    FLOAT_DTYPES,
    CodedWeight,
    group_count,
    group_order,
    known_bits,
)

READS = {"quant_method": ["gptq"], "checkpoint_format": [None, "", "gptq"]}


def decode(config: Config, module: str, tensors: Arrays) -> CodedWeight | None:
    """The weight, or None where it is stored as floats."""
    return stored(config, tensors, shift=1) if "qweight" in tensors else None


def stored(config: Config, tensors: Arrays, *, shift: int) -> CodedWeight:
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
    return CodedWeight(codes=codes, zeros=zeros, scales=scales, across=order)
