"""QServe's W4A8 tensors (arXiv 2405.04532), in safetensors with a config of our own.

qweight    int8 [out, in/2]: 32×32 tiles in the order in which a GPU's threads read them; a byte
           holds outputs n (low half) and n + 16 of its tile
s1_scales  float16 [out], the scale of each output channel
grouped weights also have, with outputs in the order 0,8,1,9 … 7,15,16,24 … of each 32:
s2_scales  int8 [in/G, out]
s2_zeros   int8 [in/G, out]: w = (code · s2_scale + s2_zero) · s1_scale
weights with one scale per channel have:
s1_szeros  float16 [out]: w = code · s1_scale − s1_szero
Inputs are int8 per token. A KV cache of 4 bits stores no scales.

QServe itself writes a pickle without a config. Two of its tools disagree on the order of outputs
in s2; the one here is that of deepcompressor, and the config records it as `group_scale_order`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.base import Format, Headers, ModelSchemes, Shapes, Written
from compressor.formats.shared.checks import describe, finite, matrix_shape, take, weight_of
from compressor.formats.shared.whole_checkpoint import common_scheme, group_size, read_group_size
from compressor.ir.qtensor import QTensor, QuantSpec, progressive
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.ir.tensor import TensorShape

TILE = 32
SMALL_GROUPS = (32, 64)
INPUT = ActivationSpec("int8", "token")
KV = KVSpec("int4", "token_head")
KV_ENTRY = {"bits": 4, "symmetric": False, "scales": "token_head"}
INPUT_ENTRY = {"bits": 8, "symmetric": True, "scales": "token"}
ORDER = [8 * half + lane + 16 * pair for pair in (0, 1) for lane in range(8) for half in (0, 1)]


class QServe(Format):
    """4-bit weights, one way of quantizing for the whole checkpoint, which is in float16."""

    name = "qserve"
    floats_in = torch.float16

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """int8 for the scales of groups, float16 for those of channels."""
        return torch.int8 if spec.strategy == "group" else torch.float16

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """QoQ's weights in whole tiles, with int8 inputs per token."""
        spec = scheme.weight
        if spec is None:
            return None if scheme.input is None else "inputs are quantized, the weight is not"
        if scheme.input != INPUT:
            return "its inputs are int8 with a scale per token"
        return _weight_reason(spec, shape)

    def shapes(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Shapes:
        """Tensors of one linear, as the module's docstring lists them."""
        spec, (rows, columns) = weight_of(scheme), shape
        per_channel = TensorShape(torch.float16, (rows,))
        names = {
            "qweight": TensorShape(torch.int8, (rows, columns // 2)),
            "s1_scales": per_channel,
        }
        if spec.strategy == "channel":
            return {**names, "s1_szeros": per_channel}
        per_group = TensorShape(torch.int8, (spec.scale_shape(*shape)[1], rows))
        return {**names, "s2_scales": per_group, "s2_zeros": per_group}

    def pack(self, q: QTensor, to: Written) -> dict[str, Tensor]:
        """Tile codes and order scales; InputError where a value has no exact form."""
        _check(q)
        assert q.zeros is not None
        if q.second is None:
            return {
                "qweight": _tiled(q.codes),
                "s1_scales": q.scales.reshape(-1).clone(),
                "s1_szeros": q.zeros.reshape(-1).clone(),
            }
        half = q.second.to(torch.float16)
        if not torch.equal(half.float(), q.second):
            raise InputError("channel scales have no exact form in float16")
        offsets = q.zeros.to(torch.int16)
        if q.spec.zero == "subtract":
            offsets = offsets * q.scales
        if bool(((offsets < -127) | (offsets > 128)).any()):
            raise InputError("a zero point times its scale does not fit into eight bits")
        return {
            "qweight": _tiled(q.codes),
            "s1_scales": half.reshape(-1),
            "s2_scales": _ordered(q.scales.t()),
            "s2_zeros": _ordered((-offsets).to(torch.int8).t()),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
        """Undo the tiles; InputError names the tensor that does not fit."""
        rows, half = matrix_shape(tensors, "qweight")
        shape = (rows, half * 2)
        if reason := _weight_reason(spec, shape):
            raise InputError(f"tensor 'qweight': {reason}")
        found = {
            name: take(tensors, name, shape=entry.shape, dtypes=(entry.dtype,))
            for name, entry in self.shapes(Scheme(weight=spec), shape, torch.float16).items()
        }
        for name, tensor in found.items():
            if tensor.dtype == torch.float16 and not finite(tensor):
                raise InputError(f"tensor {name!r} holds NaN or infinity")
        codes = _untiled(found["qweight"])
        channels = found["s1_scales"].reshape(-1, 1)
        if spec.strategy == "channel":
            zeros = found["s1_szeros"].reshape(-1, 1)
            return QTensor(spec=spec, codes=codes, scales=channels, zeros=zeros)
        scales = _in_order(found["s2_scales"]).t().contiguous()
        offsets = -_in_order(found["s2_zeros"]).t().to(torch.int16)
        return QTensor(
            spec=spec,
            codes=codes,
            scales=scales,
            zeros=_zeros(offsets, scales, spec),
            second=channels.to(torch.float32),
        )

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """Our entry. Raises InputError where linears differ, or the KV cache has another form."""
        scheme = common_scheme(schemes, name=self.name, kv=KV)
        if scheme is None or scheme.weight is None:
            return {}
        spec = scheme.weight
        return {
            "quant_method": "qserve",
            "bits": 4,
            "group_size": group_size(spec),
            "zero": spec.zero,
            "group_scale_order": ORDER,
            "input_activations": dict(INPUT_ENTRY),
            "kv_cache": None if schemes.kv is None else dict(KV_ENTRY),
            "ignore": schemes.plain,
        }

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By `quant_method`."""
        return config.get("quant_method") == "qserve"

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Every linear with a `qweight` is quantized the one way the config says."""
        known = {
            "bits": (4,),
            "zero": ("offset", "subtract"),
            "group_scale_order": (ORDER,),
            "input_activations": (INPUT_ENTRY,),
            "kv_cache": (None, KV_ENTRY),
        }
        for key, values in known.items():
            if config.get(key) not in values:
                raise InputError(f"quantization_config.{key} {config.get(key)!r} is not supported")
        scheme = Scheme(progressive(read_group_size(config), config["zero"]), INPUT)
        return ModelSchemes(
            linears={m: scheme if "qweight" in t else Scheme() for m, t in linears.items()},
            kv=None if config.get("kv_cache") is None else KV,
        )


def _weight_reason(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    grouped = spec.strategy == "group" and spec.second == "channel"
    channels = spec.strategy == "channel" and spec.second == "none" and spec.zero == "offset"
    if (spec.element, spec.bits) != ("int", 4) or not (grouped or channels) or spec.symmetric:
        return "it holds 4-bit weights, progressive by group or with an offset per channel"
    if spec.scale_dtype != (torch.int8 if grouped else torch.float16):
        return f"its scales are int8 by group and float16 by channel, not {spec.scale_dtype}"
    for count, side in zip(shape, ("outputs", "inputs"), strict=True):
        if count % TILE:
            return f"{count} {side} are not a multiple of {TILE}"
    if grouped and (not spec.group_size or shape[1] % spec.group_size):
        return f"{shape[1]} inputs do not divide into groups of {spec.group_size}"
    if grouped and spec.group_size not in SMALL_GROUPS and (spec.group_size or 0) % 128:
        return f"its kernels read groups of 32, 64 or a multiple of 128, not {spec.group_size}"
    return None


def _check(q: QTensor) -> None:
    expected = q.spec.scale_shape(*q.shape)
    wanted = {"scales": q.spec.scale_dtype, "zeros": q.spec.scale_dtype}
    if q.spec.zero == "subtract":
        wanted["zeros"] = torch.uint8
    for name, dtype in wanted.items():
        tensor: Tensor | None = getattr(q, name)
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != expected:
            found = "missing" if tensor is None else describe(tensor)
            raise InputError(f"{name} are {found}, the spec says {dtype} {list(expected)}")
        if not finite(tensor):
            raise InputError(f"{name} hold NaN or infinity")
    if q.codes.dtype != torch.uint8 or bool((q.codes > 15).any()):
        raise InputError("codes are not uint8 values of 0 … 15")
    two_levels = q.spec.second == "channel"
    if two_levels != (q.second is not None):
        raise InputError("channel scales do not go with the spec")
    if q.second is not None and tuple(q.second.shape) != (q.shape[0], 1):
        raise InputError(f"channel scales are {describe(q.second)}, not [{q.shape[0]}, 1]")


def _zeros(offsets: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """Zero points of −s2_zeros int16 [out, groups], in the form of the spec."""
    if spec.zero == "offset":
        if bool((offsets > 127).any()):
            raise InputError("tensor 's2_zeros' holds -128, which no zero point makes")
        return offsets.to(torch.int8).contiguous()
    if bool((scales < 1).any()):
        raise InputError("tensor 's2_scales' holds scales below 1")
    zeros = offsets // scales
    if bool((zeros * scales != offsets).any()) or bool(((zeros < 0) | (zeros > 15)).any()):
        raise InputError("tensor 's2_zeros' is not a zero point of 0 … 15 times its scale")
    return zeros.to(torch.uint8).contiguous()


def _tiled(codes: Tensor) -> Tensor:
    """Codes uint8 [out, in] as int8 [out, in/2]."""
    rows, columns = codes.shape
    parts = codes.reshape(rows // 32, 2, 2, 8, columns // 32, 2, 4, 4)
    pairs = parts.permute(0, 4, 3, 6, 5, 2, 7, 1)
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed.reshape(rows, columns // 2).contiguous().view(torch.int8)


def _untiled(packed: Tensor) -> Tensor:
    """The inverse of `_tiled`."""
    rows, half = packed.shape
    packed = packed.contiguous().view(torch.uint8).view(rows // 32, half // 16, 8, 4, 2, 2, 4)
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return pairs.permute(0, 7, 5, 2, 1, 4, 3, 6).reshape(rows, half * 2).contiguous()


def _ordered(values: Tensor) -> Tensor:
    """[groups, out] with the outputs of each 32 in `ORDER`."""
    tiles = values.reshape(values.shape[0], -1, TILE)
    return tiles[..., ORDER].reshape(values.shape).contiguous()


def _in_order(values: Tensor) -> Tensor:
    """The inverse of `_ordered`."""
    tiles = values.reshape(values.shape[0], -1, TILE)
    out = torch.empty_like(tiles)
    out[..., ORDER] = tiles
    return out.reshape(values.shape)


FORMAT = QServe()
