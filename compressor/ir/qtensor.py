"""A quantized weight, neutral between methods and formats.

Codes are unpacked and unsigned, scales are multipliers. `dequantize` is the one definition of what
a QTensor means; methods choose codes and scales, formats only lay them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from compressor_kernels.search.awq_candidate import STORED
from compressor_kernels.search.int_rounding import LARGEST, group_values
from torch import Tensor

Element = Literal["int", "fp4_e2m1", "fp8_e4m3"]
Strategy = Literal["tensor", "channel", "group", "block"]
ZeroForm = Literal["none", "subtract", "offset"]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one weight matrix [out, in] is quantized.

    element     what a code means: an integer, an E2M1 nibble or an E4M3 byte
    bits        bits of one code
    strategy    what shares a scale: the tensor, an output channel, a group of `group_size`
                neighbouring inputs of one channel, or a `block` = (rows, columns) tile
    zero        none: q·s, with int codes centred on 2^(bits−1);
                subtract: (q − z)·s;  offset: q·s − z, z in units of the value
    scale_dtype dtype in which the scale is stored (the value is rounded to it before codes are
                chosen, so the stored file is exactly what was searched)
    second      second-level scale, always a multiplier: none, one per tensor (NVFP4's global
                scale) or one per output channel (QoQ's level 0)
    """

    element: Element
    bits: int
    strategy: Strategy
    group_size: int | None = None
    block: tuple[int, int] | None = None
    zero: ZeroForm = "none"
    scale_dtype: torch.dtype = torch.float32
    second: Literal["none", "tensor", "channel"] = "none"

    @property
    def symmetric(self) -> bool:
        return self.zero == "none"

    @property
    def microscaled(self) -> bool:
        """Whether scales are powers of two (MXFP4, MXFP8)."""
        return self.scale_dtype == torch.float8_e8m0fnu

    @property
    def rows_apart(self) -> bool:
        """Whether no two outputs share a scale, of the one level that there is: weights may then
        lie one above the other (`QTensor.above`)."""
        return self.strategy in ("channel", "group") and self.second == "none"

    def group_in(self, width: int) -> int:
        """How many of a row's `width` inputs share a scale: all, unless groups are set."""
        return (self.group_size if self.strategy == "group" else None) or width

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of `scales` for a weight [out, in]."""
        if self.strategy == "tensor":
            return (1, 1)
        if self.strategy == "channel":
            return (out_features, 1)
        if self.strategy == "group":
            assert self.group_size is not None
            return (out_features, in_features // self.group_size)
        assert self.block is not None
        rows, columns = self.block
        return (-(-out_features // rows), -(-in_features // columns))


E8M0 = torch.float8_e8m0fnu
"""A power of two in one byte, 2^(byte-127): the scale of the OCP's microscaling formats."""

NVFP4 = QuantSpec(
    element="fp4_e2m1",
    bits=4,
    strategy="group",
    group_size=16,
    scale_dtype=torch.float8_e4m3fn,
    second="tensor",
)


MXFP4 = QuantSpec(element="fp4_e2m1", bits=4, strategy="group", group_size=32, scale_dtype=E8M0)
MXFP8 = QuantSpec(element="fp8_e4m3", bits=8, strategy="group", group_size=32, scale_dtype=E8M0)


def progressive(group_size: int | None, zero: ZeroForm) -> QuantSpec:
    """QoQ's 4-bit weights: an int8 scale per group over a float16 one per output channel; without
    groups the latter alone."""
    if group_size is None:
        return QuantSpec("int", 4, "channel", zero=zero, scale_dtype=torch.float16)
    return QuantSpec(
        "int", 4, "group", group_size, zero=zero, scale_dtype=torch.int8, second="channel"
    )


@dataclass(frozen=True, slots=True)
class QTensor:
    """Codes and scales of one weight.

    codes   uint8 [out, in]: int codes 0 … 2^bits − 1 (symmetric ones centred on 2^(bits−1)),
            E2M1 codes sign<<3 | index, or E4M3 bytes
    scales  [spec.scale_shape], in spec.scale_dtype
    zeros   same shape as scales, or None: uint8 for `subtract`, in the dtype of the scales for
            `offset` (int8 under QoQ's int8 group scales, float16 beside float16 scales)
    second  [1, 1] or [out, 1] float32 multiplier, or None
    """

    spec: QuantSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    second: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight this stands for, [out, in], computed in float32, or float64 if asked."""
        if self._in_one_pass(dtype):
            codes, scales, zeros = self.codes, self.scales, self.zeros
            return group_values(codes, scales, zeros, bits=self.spec.bits, dtype=dtype)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        # In place, on a view of the groups: of a large weight each copy would be felt.
        out = decode_elements(self.codes, self.spec, work)
        values, scales = self._broadcast(out, self.scales.to(work))
        if self.zeros is None:
            values.mul_(scales)
        else:
            _, zeros = self._broadcast(out, self.zeros.to(work))
            if self.spec.zero == "offset":
                values.mul_(scales).sub_(zeros)
            else:
                values.sub_(zeros).mul_(scales)
        if self.second is not None:
            out.mul_(self.second.to(work))
        return out.to(dtype)

    def _in_one_pass(self, dtype: torch.dtype) -> bool:
        """Whether a kernel makes the same bits: of integers in groups or rows, on a GPU."""
        spec = self.spec
        plain = spec.element == "int" and spec.rows_apart and spec.zero != "offset"
        floats = dtype in STORED and self.scales.dtype in STORED
        return (
            self.codes.is_cuda and plain and floats and 0 < spec.group_in(self.shape[1]) <= LARGEST
        )

    def _broadcast(self, weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A view of a contiguous weight [out, in], and per-group values that broadcast to it."""
        if self.spec.strategy != "group":
            return weight, spread(values, self.spec, self.shape)
        return weight.view(*values.shape, -1), values[..., None]

    def rows(self, some: slice) -> QTensor:
        """Some outputs of it, where scales are of rows or of groups in them."""
        assert self.spec.strategy in ("channel", "group")
        apart = self.second is not None and self.second.shape[0] > 1
        return QTensor(
            spec=self.spec,
            codes=self.codes[some],
            scales=self.scales[some],
            zeros=None if self.zeros is None else self.zeros[some],
            second=self.second[some] if self.second is not None and apart else self.second,
        )

    def parts(self, count: int) -> list[QTensor]:
        """What `above` was made of, `count` weights of one shape."""
        if count == 1:
            return [self]
        height = self.shape[0] // count
        return [self.rows(slice(i * height, (i + 1) * height)) for i in range(count)]

    @staticmethod
    def above(parts: Sequence[QTensor]) -> QTensor:
        """Weights of one spec, `rows_apart`, one above the other; where they lie so in memory,
        without a copy."""
        zeros = [q.zeros for q in parts if q.zeros is not None]
        return QTensor(
            spec=parts[0].spec,
            codes=_above([q.codes for q in parts]),
            scales=_above([q.scales for q in parts]),
            zeros=_above(zeros) if zeros else None,
        )

    def to(self, device: torch.device | str) -> QTensor:
        """The same value with every tensor on `device`."""
        return QTensor(
            spec=self.spec,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            second=None if self.second is None else self.second.to(device),
        )


def _above(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    storage, place = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == storage and tensor.is_contiguous()
        if not same or tensor.data_ptr() != place:
            return torch.cat(list(tensors))
        place += tensor.nbytes
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def decode_elements(codes: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """The number each code stands for before scaling, same shape as `codes`."""
    if spec.element == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).to(dtype, memory_format=torch.contiguous_format)
    if spec.element == "fp4_e2m1":
        table = torch.tensor(
            E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=dtype, device=codes.device
        )
        return table[codes.contiguous().long()]
    centre = 2 ** (spec.bits - 1) if spec.zero == "none" else 0
    return codes.to(dtype, copy=True, memory_format=torch.contiguous_format).sub_(centre)


def spread(values: Tensor, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """Per-group values [scale_shape] broadcast to a weight of `shape` (or broadcastable to it)."""
    if spec.strategy in ("tensor", "channel"):
        return values
    if spec.strategy == "group":
        assert spec.group_size is not None
        return values.repeat_interleave(spec.group_size, dim=1)
    assert spec.block is not None
    rows, columns = spec.block
    return values.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[
        :, : shape[1]
    ]
