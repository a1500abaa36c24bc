"""What several second readers share: a weight as it is decoded, grids, and NVFP4."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.formats.second_reader.arrays import Arrays, Config, Float64, array, by_rows, e4m3

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedWeight:
    """One weight as the parts that a file holds of it: (values[codes] − zeros)·scales + offsets.

    codes    uint8 [out, in]
    values   float64 value of each code, or None where a code is its own value
    scales   float64 multipliers as of `DecodedWeight`;  zeros, offsets  the same shape, or None
    across   int64 [in], the column of `scales` that an input belongs to
    down     int64 [out], the row of it that an output belongs to; None: its own, or the only one
    """

    codes: NDArray[np.uint8]
    scales: Float64
    across: NDArray[np.int64]
    values: Float64 | None = None
    zeros: Float64 | None = None
    offsets: Float64 | None = None
    down: NDArray[np.int64] | None = None

    @property
    def weight(self) -> Float64:
        """float64 [out, in], worked out anew each time."""
        zeros, scales, offsets = (
            self.by_output(x) for x in (self.zeros, self.scales, self.offsets)
        )

        def some(part: slice) -> Float64:
            codes = self.codes[part]
            weight: Float64 = (
                codes.astype(float) if self.values is None else self.values.take(codes)
            )
            if zeros is not None:
                weight -= zeros[part].take(self.across, axis=1)
            if scales is not None:
                weight *= scales[part].take(self.across, axis=1)
            if offsets is not None:
                weight += offsets[part].take(self.across, axis=1)
            return weight

        return by_rows(self.codes.shape, some)

    def by_output(self, each: Float64 | None) -> Float64 | None:
        """Scales or what is like them with a row for every output, [out, groups]."""
        if each is None or self.down is not None:
            return each if each is None else each[self.down]
        return np.broadcast_to(each, (self.codes.shape[0], each.shape[1]))


Decoded = DecodedWeight | CodedWeight


def nvfp4(tensors: Arrays, name: str, *, multiplier: float) -> CodedWeight:
    packed = array(tensors, name, shape=None, dtypes=("uint8",))
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if columns % 16:
        raise ValueError(f"{name} holds {columns} inputs, not a multiple of 16")
    codes = np.empty((rows, columns), dtype=np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    blocks = array(tensors, "weight_scale", shape=(rows, columns // 16), dtypes=("uint8",))
    scales = e4m3(blocks) * multiplier
    across = np.arange(columns) // 16
    return CodedWeight(codes=codes, values=SIGNED_E2M1, scales=scales, across=across)


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
