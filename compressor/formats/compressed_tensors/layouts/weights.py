"""How compressed-tensors writes down quantized weights: `weights`, and the scales, NVFP4's aside.

weight_scale  [out, in/G], [out, 1] or [⌈out/rows⌉, ⌈in/columns⌉], but [1] for one per tensor
"""

from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.compressed_tensors.layouts.base import arguments
from compressor.formats.compressed_tensors.layouts.inputs import BLOCK_SCALES, EXPONENTS
from compressor.formats.shared.checks import SCALE_DTYPES, int_reason, take_scales, weight_of
from compressor.ir.qtensor import QTensor, QuantSpec, Strategy
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape


def weight_entry(spec: QuantSpec) -> dict[str, Any]:
    """The QuantizationArgs of a weight."""
    nvfp4 = spec.second == "tensor"
    entry = arguments(
        bits=spec.bits,
        type="int" if spec.element == "int" else "float",
        symmetric=spec.symmetric,
        strategy="tensor_group" if nvfp4 else spec.strategy,
        group_size=spec.group_size if spec.strategy == "group" else None,
        block=spec.block if spec.strategy == "block" else None,
    )
    return entry | (EXPONENTS if spec.microscaled else BLOCK_SCALES if nvfp4 else {})


def int_weight_reason(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why an integer weight has no form in any sub-format, or None."""
    spec = weight_of(scheme)
    return int_reason(spec, shape) if 1 <= spec.bits <= 8 else f"{spec.bits} bits are not 1 to 8"


def read_int_weight(
    args: Mapping[str, Any], tensors: Mapping[str, TensorShape], *, format: str
) -> QuantSpec:
    """The spec of an integer weight; InputError for what no sub-format of integers holds."""
    if args.get("actorder") in (True, "group", "dynamic"):
        raise InputError(
            f"weights.actorder {args['actorder']!r} spreads a group over distant inputs",
            hint="supported: null, 'weight' and 'static'",
        )
    strategy = strategy_of(args)
    if args.get("type", "int") != "int" or strategy == "block":
        raise InputError(f"weights {args.get('type')!r} by {strategy!r} in {format}")
    return QuantSpec(
        element="int",
        bits=whole_number(args, "num_bits", low=1, high=8),
        strategy=strategy,
        group_size=group_size_of(args, strategy),
        zero="none" if args.get("symmetric", True) else "subtract",
        scale_dtype=stored_dtype(tensors),
    )


def strategy_of(args: Mapping[str, Any]) -> Strategy:
    """The strategy of a QuantizationArgs entry, which may leave it to the group size."""
    named, size = args.get("strategy"), args.get("group_size")
    if named is None:
        return "tensor" if size is None else "channel" if size == -1 else "group"
    for strategy in get_args(Strategy):
        if strategy == named:
            return cast(Strategy, strategy)
    raise InputError(f"weights.strategy {named!r} is not supported")


def group_size_of(args: Mapping[str, Any], strategy: Strategy) -> int | None:
    """The group size of a QuantizationArgs entry, where it is one by group."""
    return whole_number(args, "group_size", low=1, high=2**20) if strategy == "group" else None


def whole_number(args: Mapping[str, Any], key: str, *, low: int, high: int) -> int:
    """An integer key of a QuantizationArgs entry, or InputError."""
    value = args.get(key)
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"weights.{key} is {value!r}, not a whole number of {low} to {high}")
    return value


def stored_dtype(tensors: Mapping[str, TensorShape]) -> torch.dtype:
    """The dtype of `weight_scale`, which the config does not say."""
    scale = tensors.get("weight_scale")
    if scale is None or scale.dtype not in SCALE_DTYPES:
        raise InputError("tensor 'weight_scale' is missing or has an unknown dtype")
    return scale.dtype


def scale_layout(spec: QuantSpec, shape: tuple[int, int]) -> TensorShape:
    """`weight_scale` of a weight [out, in]."""
    stored = (1,) if spec.strategy == "tensor" else spec.scale_shape(*shape)
    return TensorShape(spec.scale_dtype, stored)


def encode_scales(q: QTensor) -> Tensor:
    """The scales as they are stored."""
    return q.scales.reshape(scale_layout(q.spec, q.shape).shape).contiguous()


def read_scales(tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """The scales [scale_shape] of a weight [out, in]; InputError where they do not fit."""
    stored = take_scales(tensors, "weight_scale", spec=spec, shape=scale_layout(spec, shape).shape)
    return stored.reshape(spec.scale_shape(*shape))
