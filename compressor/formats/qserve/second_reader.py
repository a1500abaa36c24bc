"""QServe's W4A8 tiles, read by their description."""

import numpy as np

from compressor.formats.second_reader.arrays import Array, Arrays, Config, array, by_rows, numbers
from compressor.formats.second_reader.grids import CodedWeight, group_count, known_bits

QSERVE_OUTPUTS = tuple(half + n for half in (0, 16) for k in range(8) for n in (k, k + 8))

READS = {"quant_method": ["qserve"]}


def decode(config: Config, module: str, tensors: Arrays) -> CodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "qweight" not in tensors:
        return None
    known_bits(config, "bits", known=(4,))
    packed = array(tensors, "qweight", shape=None, dtypes=("int8",))
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if rows % 32 or columns % 32:
        raise ValueError(f"qweight stands for [{rows}, {columns}], not whole 32x32 tiles")
    stream = np.ascontiguousarray(packed).view(np.uint8).reshape(-1)
    i = np.arange(columns)

    def nibbles(part: slice) -> Array:
        o = np.arange(rows)[part, None]
        tile = o // 32 * (columns // 32) + i // 32
        inside = o % 8 * 64 + i % 16 // 4 * 16 + i % 32 // 16 * 8 + o % 16 // 8 * 4 + i % 4
        found: Array = (stream[tile * 512 + inside] >> (o % 32 // 16 * 4)) & 15
        return found

    codes = by_rows((rows, columns), nibbles, dtype=np.uint8)
    first = numbers(tensors, "s1_scales", shape=(rows,), dtypes=("float16",))[:, None]
    if config.get("group_size") == -1:
        zeros = numbers(tensors, "s1_szeros", shape=(rows,), dtypes=("float16",))[:, None]
        one = np.zeros(columns, np.int64)
        return CodedWeight(codes=codes, scales=first, offsets=-zeros, across=one)
    groups = group_count(config, columns, tensor="qweight")
    if config.get("group_scale_order") != [*QSERVE_OUTPUTS]:
        raise ValueError("quantization_config.group_scale_order is not known")
    place = np.argsort(QSERVE_OUTPUTS)[np.arange(rows) % 32] + np.arange(rows) // 32 * 32
    scales, offsets = (
        array(tensors, name, shape=(groups, rows), dtypes=("int8",))[:, place].T.astype(float)
        for name in ("s2_scales", "s2_zeros")
    )
    # Exact in float64: (code·s2 + z2)·s1 with 4 and 8 bits, and 11 of float16.
    return CodedWeight(
        codes=codes,
        scales=scales * first,
        offsets=offsets * first,
        across=np.arange(columns) * groups // columns,
    )
