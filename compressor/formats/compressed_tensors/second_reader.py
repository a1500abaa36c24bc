"""compressed-tensors' layouts, read by their description."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.foreign.patterns import Names
from compressor.formats.second_reader.arrays import (
    Array,
    Arrays,
    Config,
    array,
    bit_stream,
    e4m3,
    numbers,
)
from compressor.formats.second_reader.grids import (
    FLOAT_DTYPES,
    SIGNED_E2M1,
    CodedWeight,
    ceil,
    group_order,
    known_bits,
    nvfp4,
)

READS = {"quant_method": ["compressed-tensors"]}


def decode(config: Config, module: str, tensors: Arrays) -> CodedWeight | None:
    """The weight, or None where no group of the config has it."""
    group = _group(config, module)
    return None if group is None else _weight(config, group, tensors)


def _weight(config: Config, group: Config, tensors: Arrays) -> CodedWeight:
    format = group.get("format") or config.get("format")
    args = group["weights"]
    if format == "pack-quantized":
        return _packed(args, tensors)
    if format in ("int-quantized", "float-quantized", "naive-quantized"):
        return _plain(args, tensors)
    if format == "nvfp4-pack-quantized":
        divisor = numbers(tensors, "weight_global_scale", shape=(1,), dtypes=("float32",))
        if divisor[0] == 0:
            raise ValueError("weight_global_scale is 0")
        # What multiplies by such a weight takes the divisor's reciprocal in float32.
        multiplier = float(np.float32(1) / np.float32(divisor[0]))
        return nvfp4(tensors, "weight_packed", multiplier=multiplier)
    if format in ("mxfp4-pack-quantized", "mxfp8-quantized"):
        return _microscaled(tensors, args)
    raise ValueError(f"quantization_config.format {format!r} is not known")


def _packed(args: Config, tensors: Arrays) -> CodedWeight:
    bits = known_bits(args, "num_bits", known=range(1, 9))
    shape = array(tensors, "weight_shape", shape=(2,), dtypes=("int64",))
    rows, columns = int(shape[0]), int(shape[1])
    if rows < 1 or columns < 1:
        raise ValueError(f"weight_shape says [{rows}, {columns}]")
    codes = _codes(tensors, "weight_packed", bits=bits, rows=rows, count=columns)
    scale_shape = _scale_shape(args, rows, columns, tensor="weight_packed")
    scales = numbers(tensors, "weight_scale", shape=scale_shape, dtypes=FLOAT_DTYPES)
    zeros = np.full(scale_shape, 2.0 ** (bits - 1))
    if not args.get("symmetric", True):
        if scale_shape == (1,):
            zeros += array(tensors, "weight_zero_point", shape=(1,), dtypes=("int8",))
        else:
            turned = {key: value.T for key, value in tensors.items()}
            zeros = _codes(
                turned, "weight_zero_point", bits=bits, rows=scale_shape[1], count=rows
            ).T.astype(np.float64)
    scales, zeros = np.atleast_2d(scales), np.atleast_2d(zeros)
    order = np.arange(columns) * scales.shape[1] // columns
    if "weight_g_idx" in tensors:
        order = group_order(tensors, "weight_g_idx", columns, groups=scales.shape[1])
    return CodedWeight(codes=codes, zeros=zeros, scales=scales, across=order)


def _codes(tensors: Arrays, name: str, *, bits: int, rows: int, count: int) -> NDArray[np.uint8]:
    """Codes [rows, count]; before 0.18 each word held 32 // bits whole codes, told by the width."""
    whole = 32 // bits
    words = array(tensors, name, shape=None, dtypes=("int32",))
    if words.shape == (rows, ceil(count, whole)) != (rows, ceil(count * bits, 32)):
        each = bit_stream(words.reshape(-1, 1), bits=bits, count=whole)
        return each.reshape(rows, -1)[:, :count]
    words = array(tensors, name, shape=(rows, ceil(count * bits, 32)), dtypes=("int32",))
    return bit_stream(words, bits=bits, count=count)


def _plain(args: Config, tensors: Arrays) -> CodedWeight:
    floats = args.get("type", "int") == "float"
    stored = array(tensors, "weight", shape=None, dtypes=("uint8",) if floats else ("int8",))
    rows, columns = stored.shape
    shape = _scale_shape(args, rows, columns, tensor="weight")
    scales = np.atleast_2d(numbers(tensors, "weight_scale", shape=shape, dtypes=FLOAT_DTYPES))
    half = 2 ** (int(args.get("num_bits", 8)) - 1)
    codes = stored if floats else (stored.astype(np.int16) + half).astype(np.uint8)
    zeros = None
    if not args.get("symmetric", True):
        zeros = np.atleast_2d(array(tensors, "weight_zero_point", shape=shape, dtypes=("int8",)))
    height, width = args.get("block_structure") or (
        ceil(rows, scales.shape[0]),
        ceil(columns, scales.shape[1]),
    )
    # A code is a byte; int8 is raised by half of its codes.
    values = e4m3(np.arange(256)) if floats else np.arange(256.0) - half
    return CodedWeight(
        codes=codes,
        values=values,
        zeros=None if zeros is None else zeros.astype(np.float64),
        scales=scales,
        down=np.arange(rows) // height,
        across=np.arange(columns) // width,
    )


def _microscaled(tensors: Arrays, args: Config) -> CodedWeight:
    bits = known_bits(args, "num_bits", known=(4, 8))
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

    return CodedWeight(
        codes=codes,
        values=SIGNED_E2M1 if bits == 4 else e4m3(np.arange(256)),
        scales=scales,
        across=np.arange(columns) // 32,
    )


def _as_words(bytes: Array) -> Array:
    """uint8 [rows, n] as int32 words [rows, n/4], what is missing filled with zeros."""
    padded = np.pad(bytes, ((0, 0), (0, -bytes.shape[1] % 4)))
    return np.ascontiguousarray(padded).view("<i4")


def _group(config: Config, module: str) -> Config | None:
    """The config group of a module: by name first, then by the class Linear."""
    where = "quantization_config"
    if module in Names(config.get("ignore") or (), where=where):
        return None
    groups: list[Mapping[str, Any]] = list(config.get("config_groups", {}).values())
    for group in groups:
        if module in Names(group["targets"], where=where):
            return group
    return next((group for group in groups if "Linear" in group["targets"]), None)


def _scale_shape(args: Config, rows: int, columns: int, *, tensor: str) -> tuple[int, ...]:
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
        return (ceil(rows, height), ceil(columns, width))
    raise ValueError(f"{tensor}: {columns} inputs by {strategy!r} of {size} is not known")
