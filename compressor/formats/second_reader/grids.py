"""What several second readers share: a weight as it is decoded, grids, and NVFP4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.formats.second_reader.arrays import (
    Array,
    Arrays,
    Config,
    Float64,
    array,
    by_rows,
    e4m3,
)

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SIGNED_E2M1 = np.concatenate([E2M1, -E2M1])
FLOAT_DTYPES = ("float16", "float32", "float64", "uint16")


@dataclass(frozen=True, slots=True)
class DecodedWeight:
    """One weight as it stands in a file.

    weight  float64 [out, in]
    codes   uint8 [out, in] as stored (int8 raised by half the codes), or None for a float weight
    scales  float64 multipliers [out, groups], [out, 1], [1, 1] or one per block, second level
            included; None for a float weight
    """

    weight: Float64
    codes: NDArray[np.uint8] | None = None
    scales: Float64 | None = None


def affine(codes: Array, zeros: Array, scales: Array, *, order: NDArray[np.int64]) -> Float64:
    """(code − zero)·scale in float64, with the group of each input in `order`."""
    each = (codes.shape[0], scales.shape[1])
    zeros, scales = np.broadcast_to(zeros, each), np.broadcast_to(scales, each)

    def some(part: slice) -> Float64:
        weight: Float64 = codes[part] - zeros[part].take(order, axis=1)
        weight *= scales[part].take(order, axis=1)
        return weight

    return by_rows(codes.shape, some)


def nvfp4(tensors: Arrays, name: str, *, multiplier: float) -> DecodedWeight:
    packed = array(tensors, name, shape=None, dtypes=("uint8",))
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if columns % 16:
        raise ValueError(f"{name} holds {columns} inputs, not a multiple of 16")
    codes = np.empty((rows, columns), dtype=np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    blocks = array(tensors, "weight_scale", shape=(rows, columns // 16), dtypes=("uint8",))
    scales = e4m3(blocks) * multiplier

    def some(part: slice) -> Float64:
        weight: Float64 = SIGNED_E2M1.take(codes[part])
        weight *= scales[part].repeat(16, axis=1)
        return weight

    return DecodedWeight(by_rows((rows, columns), some), codes, scales)


def known_bits(config: Config, key: str, *, known: Sequence[int]) -> int:
    bits = config.get(key)
    if type(bits) is not int or bits not in known:
        raise ValueError(f"quantization_config: {key} {bits!r} is not known")
    return bits


def group_count(config: Config, columns: int, *, tensor: str) -> int:
    size = config.get("group_size")
    if size == -1:
        return 1
    if not isinstance(size, int) or size < 1 or columns % size:
        raise ValueError(f"{tensor}: {columns} inputs do not divide into groups of {size}")
    return columns // size


def group_order(tensors: Arrays, name: str, columns: int, *, groups: int) -> NDArray[np.int64]:
    order = array(tensors, name, shape=(columns,), dtypes=("int32", "int64"))
    if order.min() < 0 or order.max() >= groups:
        raise ValueError(f"{name} names groups outside 0 … {groups - 1}")
    return order.astype(np.int64)


def ceil(a: int, b: int) -> int:
    return -(-a // b)
