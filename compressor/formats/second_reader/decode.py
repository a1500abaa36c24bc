"""A second reader of quantized weights, for verification: numpy only, written from the formats'
descriptions, sharing no code with the writers.

Arrays are as the file holds them. numpy has no bfloat16 and no float8, so bfloat16 arrives as
uint16 bit patterns and float8 E4M3 as uint8. Every complaint is a ValueError that names the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.foreign.patterns import Names
from compressor.formats.second_reader.arrays import (
    Array,
    Float64,
    array,
    bit_stream,
    by_rows,
    e4m3,
    numbers,
)

AWQ_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
QSERVE_OUTPUTS = tuple(half + n for half in (0, 16) for k in range(8) for n in (k, k + 8))
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


def decode_linear(
    quantization_config: Mapping[str, Any] | None, module: str, tensors: Mapping[str, Array]
) -> DecodedWeight:
    """The weight of linear `module` from its local tensors ("weight_packed", "qweight" …).

    quantization_config  the entry of config.json, empty or None for a float checkpoint
    """
    config = quantization_config or {}
    method = config.get("quant_method")
    if method == "compressed-tensors":
        group = _ct_group(config, module)
        if group is not None:
            return _compressed_tensors(config, group, tensors)
    elif method == "awq" and "qweight" in tensors:
        return _awq(config, tensors)
    elif method == "gptq" and "qweight" in tensors:
        return _gptq(config, tensors)
    elif method == "modelopt" and "weight_scale" in tensors:
        return _modelopt(config, tensors)
    elif method == "qserve" and "qweight" in tensors:
        return _qserve(config, tensors)
    elif method not in (None, "awq", "gptq", "modelopt", "qserve"):
        raise ValueError(f"quantization_config.quant_method {method!r} is not known")
    return DecodedWeight(numbers(tensors, "weight", shape=None, dtypes=FLOAT_DTYPES))


def _compressed_tensors(
    config: Mapping[str, Any], group: Mapping[str, Any], tensors: Mapping[str, Array]
) -> DecodedWeight:
    format = group.get("format") or config.get("format")
    args = group["weights"]
    if format == "pack-quantized":
        return _ct_packed(args, tensors)
    if format in ("int-quantized", "float-quantized", "naive-quantized"):
        return _ct_plain(args, tensors)
    if format == "nvfp4-pack-quantized":
        divisor = numbers(tensors, "weight_global_scale", shape=(1,), dtypes=("float32",))
        if divisor[0] == 0:
            raise ValueError("weight_global_scale is 0")
        # What multiplies by such a weight takes the divisor's reciprocal in float32.
        multiplier = float(np.float32(1) / np.float32(divisor[0]))
        return _nvfp4(tensors, "weight_packed", multiplier=multiplier)
    if format in ("mxfp4-pack-quantized", "mxfp8-quantized"):
        return _microscaled(tensors, args)
    raise ValueError(f"quantization_config.format {format!r} is not known")


def _ct_packed(args: Mapping[str, Any], tensors: Mapping[str, Array]) -> DecodedWeight:
    bits = _bits(args, "num_bits", known=range(1, 9))
    shape = array(tensors, "weight_shape", shape=(2,), dtypes=("int64",))
    rows, columns = int(shape[0]), int(shape[1])
    if rows < 1 or columns < 1:
        raise ValueError(f"weight_shape says [{rows}, {columns}]")
    codes = _ct_codes(tensors, "weight_packed", bits=bits, rows=rows, count=columns)
    scale_shape = _ct_scale_shape(args, rows, columns, tensor="weight_packed")
    scales = numbers(tensors, "weight_scale", shape=scale_shape, dtypes=FLOAT_DTYPES)
    zeros = np.full(scale_shape, 2.0 ** (bits - 1))
    if not args.get("symmetric", True):
        if scale_shape == (1,):
            zeros += array(tensors, "weight_zero_point", shape=(1,), dtypes=("int8",))
        else:
            turned = {key: value.T for key, value in tensors.items()}
            zeros = _ct_codes(
                turned, "weight_zero_point", bits=bits, rows=scale_shape[1], count=rows
            ).T.astype(np.float64)
    scales, zeros = np.atleast_2d(scales), np.atleast_2d(zeros)
    order = np.arange(columns) * scales.shape[1] // columns
    if "weight_g_idx" in tensors:
        order = _group_order(tensors, "weight_g_idx", columns, groups=scales.shape[1])
    return DecodedWeight(_affine(codes, zeros, scales, order=order), codes, scales)


def _ct_codes(
    tensors: Mapping[str, Array], name: str, *, bits: int, rows: int, count: int
) -> NDArray[np.uint8]:
    """Codes [rows, count]; before 0.18 each word held 32 // bits whole codes, told by the width."""
    whole = 32 // bits
    words = array(tensors, name, shape=None, dtypes=("int32",))
    if words.shape == (rows, _ceil(count, whole)) != (rows, _ceil(count * bits, 32)):
        each = bit_stream(words.reshape(-1, 1), bits=bits, count=whole)
        return each.reshape(rows, -1)[:, :count]
    words = array(tensors, name, shape=(rows, _ceil(count * bits, 32)), dtypes=("int32",))
    return bit_stream(words, bits=bits, count=count)


def _ct_plain(args: Mapping[str, Any], tensors: Mapping[str, Array]) -> DecodedWeight:
    floats = args.get("type", "int") == "float"
    stored = array(tensors, "weight", shape=None, dtypes=("uint8",) if floats else ("int8",))
    rows, columns = stored.shape
    shape = _ct_scale_shape(args, rows, columns, tensor="weight")
    scales = np.atleast_2d(numbers(tensors, "weight_scale", shape=shape, dtypes=FLOAT_DTYPES))
    half = 2 ** (int(args.get("num_bits", 8)) - 1)
    codes = stored if floats else (stored.astype(np.int16) + half).astype(np.uint8)
    zeros = None
    if not args.get("symmetric", True):
        zeros = np.atleast_2d(array(tensors, "weight_zero_point", shape=shape, dtypes=("int8",)))
    height, width = args.get("block_structure") or (
        _ceil(rows, scales.shape[0]),
        _ceil(columns, scales.shape[1]),
    )
    down, across = np.arange(rows) // height, np.arange(columns) // width

    def some(part: slice) -> Float64:
        weight = e4m3(stored[part]) if floats else stored[part].astype(np.float64)
        if zeros is not None:
            weight -= zeros[down[part]].take(across, axis=1)
        weight *= scales[down[part]].take(across, axis=1)
        return weight

    return DecodedWeight(by_rows(stored.shape, some), codes, scales)


def _nvfp4(tensors: Mapping[str, Array], name: str, *, multiplier: float) -> DecodedWeight:
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


def _microscaled(tensors: Mapping[str, Array], args: Mapping[str, Any]) -> DecodedWeight:
    bits = _bits(args, "num_bits", known=(4, 8))
    if args.get("group_size") != 32:
        raise ValueError(f"quantization_config: group_size {args.get('group_size')!r} is not 32")
    name = "weight_packed" if bits == 4 else "weight"
    stored = array(tensors, name, shape=None, dtypes=("uint8",))
    codes = (
        bit_stream(_as_words(stored), bits=4, count=stored.shape[1] * 2) if bits == 4 else stored
    )
    rows, columns = codes.shape
    if columns % 32:
        raise ValueError(f"{name} holds {columns} inputs, not a multiple of 32")
    exponents = array(tensors, "weight_scale", shape=(rows, columns // 32), dtypes=("uint8",))
    if (exponents == 255).any():
        raise ValueError("weight_scale holds NaN (byte 255)")
    scales = np.ldexp(1.0, exponents.astype(np.int64) - 127)

    def some(part: slice) -> Float64:
        values = SIGNED_E2M1.take(codes[part]) if bits == 4 else e4m3(codes[part])
        weight: Float64 = values * scales[part].repeat(32, axis=1)
        return weight

    return DecodedWeight(by_rows(codes.shape, some), codes, scales)


def _as_words(bytes: Array) -> Array:
    """uint8 [rows, n] as int32 words [rows, n/4], what is missing filled with zeros."""
    padded = np.pad(bytes, ((0, 0), (0, -bytes.shape[1] % 4)))
    words: Array = np.ascontiguousarray(padded).view("<i4")
    return words


def _modelopt(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> DecodedWeight:
    algorithm = config.get("quant_algo")
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        multiplier = numbers(tensors, "weight_scale_2", shape=(), dtypes=("float32",))
        return _nvfp4(tensors, "weight", multiplier=float(multiplier))
    if algorithm != "FP8":
        raise ValueError(f"quantization_config.quant_algo {algorithm!r} is not known")
    raw = array(tensors, "weight", shape=None, dtypes=("uint8",))
    scale = numbers(tensors, "weight_scale", shape=(), dtypes=("float32",))
    weight = e4m3(raw)
    weight *= scale
    return DecodedWeight(weight, raw, scale.reshape(1, 1))


def _qserve(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> DecodedWeight:
    _bits(config, "bits", known=(4,))
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
        weight = by_rows(codes.shape, lambda part: codes[part] * first[part] - zeros[part])
        return DecodedWeight(weight, codes, first)
    groups = _group_count(config, columns, tensor="qweight")
    if config.get("group_scale_order") != [*QSERVE_OUTPUTS]:
        raise ValueError("quantization_config.group_scale_order is not known")
    place = np.argsort(QSERVE_OUTPUTS)[np.arange(rows) % 32] + np.arange(rows) // 32 * 32
    scales, offsets = (
        array(tensors, name, shape=(groups, rows), dtypes=("int8",))[:, place].T.astype(float)
        for name in ("s2_scales", "s2_zeros")
    )
    order = np.arange(columns) * groups // columns

    def affine(part: slice) -> Float64:
        weight: Float64 = codes[part] * scales[part].take(order, axis=1)
        weight += offsets[part].take(order, axis=1)
        weight *= first[part]
        return weight

    return DecodedWeight(by_rows(codes.shape, affine), codes, scales * first)


def _awq(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> DecodedWeight:
    _bits(config, "bits", known=(4,))
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"quantization_config.version {config['version']!r} is not known")
    qweight = array(tensors, "qweight", shape=None, dtypes=("int32",))
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    groups = _group_count(config, columns, tensor="qweight")
    qzeros = array(tensors, "qzeros", shape=(groups, rows // 8), dtypes=("int32",))
    scales = numbers(tensors, "scales", shape=(groups, rows), dtypes=FLOAT_DTYPES).T

    def nibbles(words: Array) -> NDArray[np.uint8]:
        bits = np.ascontiguousarray(words.astype("<i4").view("<u4").T)
        found = np.empty((bits.shape[0] * 8, bits.shape[1]), dtype=np.uint8)
        for output, nibble in enumerate(AWQ_NIBBLE_OF_OUTPUT):
            found[output::8] = (bits >> (4 * nibble)) & 15
        return found

    codes, zeros = nibbles(qweight), nibbles(qzeros).astype(np.float64)
    order = np.arange(columns) * groups // columns
    return DecodedWeight(_affine(codes, zeros, scales, order=order), codes, scales)


def _gptq(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> DecodedWeight:
    bits = _bits(config, "bits", known=(2, 3, 4, 8))
    marker = config.get("checkpoint_format") or "gptq"
    if marker not in ("gptq", "gptq_v2"):
        raise ValueError(f"quantization_config.checkpoint_format {marker!r} is not known")
    qweight = array(tensors, "qweight", shape=None, dtypes=("int32",))
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = _group_count(config, columns, tensor="qweight")
    qzeros = array(tensors, "qzeros", shape=(groups, rows * bits // 32), dtypes=("int32",))
    scales = numbers(tensors, "scales", shape=(groups, rows), dtypes=FLOAT_DTYPES).T
    codes = bit_stream(qweight.T, bits=bits, count=columns)
    zeros = bit_stream(qzeros, bits=bits, count=rows).T.astype(np.float64)
    if marker == "gptq":
        zeros += 1
    order = _group_order(tensors, "g_idx", columns, groups=groups)
    return DecodedWeight(_affine(codes, zeros, scales, order=order), codes, scales)


def _ct_group(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """The config group of a module: by name first, then by the class Linear."""
    where = "quantization_config"
    if module in Names(config.get("ignore") or (), where=where):
        return None
    groups: list[Mapping[str, Any]] = list(config.get("config_groups", {}).values())
    for group in groups:
        if module in Names(group["targets"], where=where):
            return group
    return next((group for group in groups if "Linear" in group["targets"]), None)


def _ct_scale_shape(
    args: Mapping[str, Any], rows: int, columns: int, *, tensor: str
) -> tuple[int, ...]:
    strategy, size = args.get("strategy"), args.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return (1,)
    if strategy == "channel":
        return (rows, 1)
    if strategy == "group" and isinstance(size, int) and size > 0 and columns % size == 0:
        return (rows, columns // size)
    if strategy == "block":
        height, width = args["block_structure"]
        return (_ceil(rows, height), _ceil(columns, width))
    raise ValueError(f"{tensor}: {columns} inputs by {strategy!r} of {size} is not known")


def _group_count(config: Mapping[str, Any], columns: int, *, tensor: str) -> int:
    size = config.get("group_size")
    if size == -1:
        return 1
    if not isinstance(size, int) or size < 1 or columns % size:
        raise ValueError(f"{tensor}: {columns} inputs do not divide into groups of {size}")
    return columns // size


def _group_order(
    tensors: Mapping[str, Array], name: str, columns: int, *, groups: int
) -> NDArray[np.int64]:
    order = array(tensors, name, shape=(columns,), dtypes=("int32", "int64"))
    if order.min() < 0 or order.max() >= groups:
        raise ValueError(f"{name} names groups outside 0 … {groups - 1}")
    return order.astype(np.int64)


def _affine(codes: Array, zeros: Array, scales: Array, *, order: NDArray[np.int64]) -> Float64:
    """(code − zero)·scale in float64, with the group of each input in `order`."""
    each = (codes.shape[0], scales.shape[1])
    zeros, scales = np.broadcast_to(zeros, each), np.broadcast_to(scales, each)

    def some(part: slice) -> Float64:
        weight: Float64 = codes[part] - zeros[part].take(order, axis=1)
        weight *= scales[part].take(order, axis=1)
        return weight

    return by_rows(codes.shape, some)


def _bits(config: Mapping[str, Any], key: str, *, known: Sequence[int]) -> int:
    bits = config.get(key)
    if type(bits) is not int or bits not in known:
        raise ValueError(f"quantization_config: {key} {bits!r} is not known")
    return bits


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
