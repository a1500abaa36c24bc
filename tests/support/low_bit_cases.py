"""Specs below 16 bits in every format that holds them, and shapes to try them on."""

import torch

from compressor.formats.shared.e2m1 import LOCAL
from compressor.formats.shared.mx import INPUTS
from compressor.ir.qtensor import MXFP4, MXFP8, NVFP4, QuantSpec
from compressor.ir.scheme import ActivationSpec
from compressor.ir.tensor import TensorShape

BF16, F16, F32, I8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
TOKEN8, STATIC8 = ActivationSpec("int8", "token"), ActivationSpec("int8", "static")
FP8_TOKEN, FP8_STATIC = ActivationSpec("fp8_e4m3", "token"), ActivationSpec("fp8_e4m3", "static")
FP8_GROUP = ActivationSpec("fp8_e4m3", "group", 128)


def integers(bits=8, strategy="channel", group=None, zero="none", dtype=BF16):
    return QuantSpec("int", bits, strategy, group, zero=zero, scale_dtype=dtype)


def fp8(strategy, *, group=None, block=None, dtype=BF16):
    return QuantSpec("fp8_e4m3", 8, strategy, group, block, scale_dtype=dtype)


def qoq(group, zero="offset"):
    """QoQ's weights: progressive in groups, or with an offset by channel."""
    if group:
        return progressive(zero, group)
    return QuantSpec("int", 4, "channel", zero=zero, scale_dtype=F16)


def progressive(zero, group=32):
    return QuantSpec("int", 4, "group", group, zero=zero, scale_dtype=I8, second="channel")


CASES = [
    *(
        ("compressed-tensors", integers(bits, strategy, group, zero, dtype), input, shape)
        for bits in (4, 8)
        for strategy, group in (("channel", None), ("tensor", None), ("group", 10))
        for zero in ("none", "subtract")
        for dtype in (BF16, F32)
        for input in (TOKEN8, STATIC8, ActivationSpec("int8", "tensor"), FP8_TOKEN)
        for shape in ((7, 70),)
    ),
    *(
        ("compressed-tensors", spec, input, shape)
        for spec in (
            fp8("tensor"),
            fp8("channel", dtype=F16),
            fp8("group", group=10, dtype=F32),
            fp8("block", block=(128, 128)),
            fp8("block", block=(3, 16)),
        )
        for input in (None, FP8_TOKEN, FP8_STATIC, ActivationSpec("fp8_e4m3", "tensor"))
        for shape in ((7, 70), (130, 300))
    ),
    ("compressed-tensors", fp8("block", block=(128, 128)), FP8_GROUP, (130, 256)),
    *(
        (name, NVFP4, input, shape)
        for name in ("compressed-tensors", "modelopt-nvfp4")
        for input in (None, LOCAL)
        for shape in ((7, 64), (1, 16), (130, 48))
    ),
    *(
        ("compressed-tensors", spec, input, shape)
        for spec in (MXFP4, MXFP8)
        for input in (None, INPUTS[spec.element])
        for shape in ((7, 64), (1, 32), (130, 96))
    ),
    *(("gpt-oss", MXFP4, None, shape) for shape in ((7, 64), (1, 32), (130, 96))),
    *(("modelopt-fp8", fp8("tensor", dtype=F32), FP8_STATIC, s) for s in ((7, 70), (128, 128))),
    *(
        ("fp8", fp8("block", block=(128, 128), dtype=F32), FP8_GROUP, shape)
        for shape in ((7, 128), (130, 256))
    ),
    *(
        ("qserve", spec, TOKEN8, shape)
        for spec in (
            progressive("offset"),
            progressive("subtract"),
            progressive("offset", group=64),
            QuantSpec("int", 4, "channel", zero="offset", scale_dtype=F16),
        )
        for shape in ((32, 64), (96, 128))
    ),
]
FORMATS = ("compressed-tensors", "modelopt-nvfp4", "modelopt-fp8", "fp8", "gpt-oss", "qserve")


def cases(name):
    return [case[1:] for case in CASES if case[0] == name]


def shapes(tensors):
    return {name: TensorShape(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
