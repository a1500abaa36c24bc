"""Arrays of the second reader: what a file holds, checked, and the codes and numbers in it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Arrays = Mapping[str, Array]
Config = Mapping[str, Any]


def by_rows(
    shape: tuple[int, ...], some: Callable[[slice], Array], *, dtype: type = np.float64
) -> Array:
    """A matrix made a few rows at a time, so that no other array is of its size."""
    whole: Array = np.empty(shape, dtype)
    step = max(1, 2**18 // max(1, shape[1]))
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        whole[rows] = some(rows)
    return whole


def bit_stream(words: Array, *, bits: int, count: int) -> NDArray[np.uint8]:
    """Codes [n, count] of int32 rows [n, words] read as one little-endian bit stream each."""
    stream = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if 8 % bits:  # else no code goes on in the next byte
        stream = np.pad(stream, ((0, 0), (0, 1)))
    codes = np.empty((stream.shape[0], count), dtype=np.uint8)
    period = 8 // math.gcd(bits, 8)  # codes after which one starts at a whole byte again
    for k in range(min(period, count)):
        every = codes[:, k::period]
        first, shift = divmod(k * bits, 8)
        apart = bits * period // 8
        window: Array = stream[:, first::apart][:, : every.shape[1]]
        if shift + bits > 8:
            high = stream[:, first + 1 :: apart][:, : every.shape[1]]
            window = window | high.astype(np.uint16) << 8
        every[:] = (window >> shift) & ((1 << bits) - 1)
    return codes


def e4m3(raw: Array) -> Float64:
    """float8 E4M3 (finite only; 0x7F is NaN) from its bytes."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    magnitude[(byte & 127) == 127] = np.nan
    table = np.where(byte & 128, -magnitude, magnitude)
    return table[raw]


def numbers(
    tensors: Arrays,
    name: str,
    *,
    shape: tuple[int, ...] | None,
    dtypes: Sequence[str],
) -> Float64:
    """A finite float tensor as float64; uint16 is bfloat16."""
    found = array(tensors, name, shape=shape, dtypes=dtypes)
    if found.dtype == np.uint16:
        found = (found.astype(np.uint32) << 16).view(np.float32)
    values = found.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return values


def array(
    tensors: Arrays,
    name: str,
    *,
    shape: tuple[int, ...] | None,
    dtypes: Sequence[str],
) -> Array:
    """A tensor of one of `dtypes` and of `shape`, or any matrix where no shape is given."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    found = tensors[name]
    if found.dtype.name not in dtypes:
        raise ValueError(f"{name} is {found.dtype.name}, not {' or '.join(dtypes)}")
    if shape is None and found.ndim != 2:
        raise ValueError(f"{name} is {found.shape}, not a matrix")
    if shape is not None and found.shape != shape:
        raise ValueError(f"{name} is {found.shape}, not {shape}")
    return found
