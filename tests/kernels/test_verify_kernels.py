"""The kernel that verify runs for each kind of scheme, on what the formats store."""

from dataclasses import replace

import pytest
import torch
from compressor_kernels.attention import quantized_cache

from compressor.errors import InputError
from compressor.formats.base import format_names, get_format
from compressor.formats.compressed_tensors.codec import FORMAT as COMPRESSED_TENSORS
from compressor.formats.compressed_tensors.layouts.pack_quantized import PackQuantized
from compressor.formats.qserve.codec import FORMAT as QSERVE
from compressor.formats.shared.e2m1 import DYNAMIC, LOCAL
from compressor.formats.shared.mx import INPUTS
from compressor.ir.layout import AttentionShape
from compressor.ir.qtensor import MXFP4, MXFP8, NVFP4, QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.methods.awq.method import Awq
from compressor.methods.fp8 import Fp8
from compressor.methods.gptq import Gptq
from compressor.methods.mxfp4 import Mxfp4
from compressor.methods.mxfp8 import Mxfp8
from compressor.methods.nvfp4 import Nvfp4
from compressor.methods.progressive import Progressive
from compressor.methods.rtn import Rtn
from compressor.methods.smoothquant import Smoothquant
from compressor.numerics.fp8 import quantize_fp8
from compressor.numerics.int_affine import quantize_int
from compressor.numerics.mx import quantize_mx
from compressor.numerics.nvfp4 import quantize_nvfp4
from compressor.numerics.progressive import quantize_offset, quantize_progressive
from compressor.verify.kernels.cache import cache_kernel, check_cache
from compressor.verify.kernels.check import WHOLE_ROWS, check_kernel, kernel_for
from compressor.verify.kernels.layer import EVERYTHING, Layer, Tile
from tests.support.low_bit_cases import qoq

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (192, 384)
TOKEN, TENSOR, STATIC = (ActivationSpec("int8", mode) for mode in ("token", "tensor", "static"))
FP8_TOKEN, FP8_STATIC = (ActivationSpec("fp8_e4m3", mode) for mode in ("token", "static"))
FP8_GROUP = ActivationSpec("fp8_e4m3", "group", 128)


def integer(strategy, *, bits=8, group=None, zero="none"):
    return QuantSpec(
        element="int",
        bits=bits,
        strategy=strategy,
        group_size=group,
        zero=zero,
        scale_dtype=torch.bfloat16,
    )


def fp8(strategy, *, block=None, group=None):
    return QuantSpec(
        element="fp8_e4m3",
        bits=8,
        strategy=strategy,
        block=block,
        group_size=group,
        scale_dtype=torch.bfloat16,
    )


def layer(scheme):
    """A random weight as its format stores it."""
    spec = scheme.weight
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(*SHAPE, generator=generator) * 0.05
    if spec.microscaled:
        q = quantize_mx(weight, spec, rule="mse")
    elif spec.element == "fp8_e4m3":
        q = quantize_fp8(weight, spec)
    elif spec.element == "fp4_e2m1":
        q = quantize_nvfp4(weight, spec, rule="mse")
    elif spec.scale_dtype == torch.bfloat16:
        q = quantize_int(weight + (0.02 if spec.zero == "subtract" else 0), spec)
    else:
        q = (quantize_progressive if spec.second == "channel" else quantize_offset)(weight, spec)
    if q.second is not None and spec.element == "fp4_e2m1":
        q = replace(q, second=q.second.reciprocal().reciprocal())
    stored = scheme.input is not None and scheme.input.mode in ("static", "local")
    qserve = spec.second == "channel" or spec.zero == "offset"
    encode = (QSERVE if qserve else COMPRESSED_TENSORS).encode
    tensors = encode(
        q,
        model_dtype=torch.bfloat16,
        input=scheme.input,
        input_scale=torch.tensor([0.015]) if stored else None,
    )
    return Layer("a", scheme, tensors, q, q.dequantize(torch.float64))


SCHEMES = {
    "w8a8 int8 channel, token": (Scheme(integer("channel"), TOKEN), "w8a8"),
    "w8a8 int8 tensor, tensor": (Scheme(integer("tensor"), TENSOR), "w8a8"),
    "w8a8 int8 tensor, static": (Scheme(integer("tensor"), STATIC), "w8a8"),
    "w8a8 int8 groups, token": (Scheme(integer("group", group=128), TOKEN), "w8a8"),
    "w4a8 in bytes": (Scheme(integer("channel", bits=4), TOKEN), "w8a8"),
    "fp8 tensor, static": (Scheme(fp8("tensor"), FP8_STATIC), "w8a8"),
    "fp8 channel, token": (Scheme(fp8("channel"), FP8_TOKEN), "w8a8"),
    "fp8 blocks": (Scheme(fp8("block", block=(128, 128)), FP8_GROUP), "w8a8"),
    "fp8 groups": (Scheme(fp8("group", group=128), FP8_GROUP), "w8a8"),
    "nvfp4 weight only": (Scheme(NVFP4), "nvfp4"),
    "nvfp4 calibrated": (Scheme(NVFP4, LOCAL), "nvfp4"),
    "nvfp4 dynamic": (Scheme(NVFP4, DYNAMIC), "nvfp4"),
    "mxfp4 weight only": (Scheme(MXFP4), "mx"),
    "mxfp4": (Scheme(MXFP4, INPUTS["fp4_e2m1"]), "mx"),
    "mxfp8 weight only": (Scheme(MXFP8), "mx"),
    "mxfp8": (Scheme(MXFP8, INPUTS["fp8_e4m3"]), "mx"),
    "qoq g128": (Scheme(qoq(128), TOKEN), "w4a8"),
    "qoq g64 subtract": (Scheme(qoq(64, "subtract"), TOKEN), "w4a8"),
    "qoq channel": (Scheme(qoq(None), TOKEN), "w4a8"),
    "w8a8 asymmetric": (Scheme(integer("channel", zero="subtract"), TOKEN), "w8a8"),
    "w8a8 asymmetric tensor": (Scheme(integer("tensor", zero="subtract"), STATIC), "w8a8"),
    "w4a16": (Scheme(integer("group", bits=4, group=64, zero="subtract")), "w4a16"),
    "w4a16 odd groups": (Scheme(integer("group", bits=4, group=96)), "weight_only"),
    "w8a16": (Scheme(integer("channel")), "weight_only"),
    "w8a16 asymmetric": (Scheme(integer("group", group=64, zero="subtract")), "weight_only"),
    "w3a16": (Scheme(integer("group", bits=3, group=64)), "weight_only"),
    "w3a16 asymmetric": (Scheme(integer("channel", bits=3, zero="subtract")), "weight_only"),
    "w5a16 inside words": (
        Scheme(integer("group", bits=5, group=12, zero="subtract")),
        "weight_only",
    ),
    "w2a16 tensor": (Scheme(integer("tensor", bits=2, zero="subtract")), "weight_only"),
    "w8a8 small groups": (Scheme(integer("group", group=64), TOKEN), "weight_only"),
    "w8a8 asymmetric groups": (
        Scheme(integer("group", group=128, zero="subtract"), STATIC),
        "weight_only",
    ),
    "w4afp8": (Scheme(integer("group", bits=4, group=128), FP8_TOKEN), "weight_only"),
    "int8 beside fp8": (Scheme(integer("channel"), FP8_TOKEN), "weight_only"),
    "fp8 alone": (Scheme(fp8("channel")), "weight_only"),
    "fp8 alone, tensor": (Scheme(fp8("tensor")), "weight_only"),
    "fp8 alone, blocks": (Scheme(fp8("block", block=(128, 128))), "weight_only"),
    "fp8 alone, other blocks": (Scheme(fp8("block", block=(48, 64))), "weight_only"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_kernel_of_each_scheme_agrees_with_float64(name):
    scheme, kernel = SCHEMES[name]
    check = kernel_for(scheme, SHAPE)
    assert check is not None and check.name == kernel
    made = layer(scheme)
    for seed in range(1 if kernel == "weight_only" else 2):  # another tile each
        result = check_kernel(check, made, device=DEVICE, seed=seed)
        assert not result.problem and result.triton and 0 <= result.error < 2e-2
    other = made.weight.clone()
    other[:, ::7] *= 1.02  # what another reader would have to see for the product to be wrong
    found = check_kernel(check, replace(made, weight=other), device=DEVICE, seed=0)
    assert "gives" in found.problem


@pytest.mark.parametrize("name", SCHEMES)
def test_the_reference_takes_a_layer_in_parts(name):
    scheme, _ = SCHEMES[name]
    check, made = kernel_for(scheme, SHAPE), layer(scheme)
    x = torch.randn(2, SHAPE[1], generator=torch.Generator().manual_seed(1))
    made = check.prepared(made)
    whole = check.reference(made, x, EVERYTHING)
    for start in range(0, SHAPE[0], WHOLE_ROWS):
        rows = slice(start, start + WHOLE_ROWS)
        part = check.reference(made, x, Tile(rows=rows, columns=slice(None)))
        for side in ("found", "expected", "bound"):
            close = torch.testing.assert_close
            close(getattr(part, side), getattr(whole, side)[:, rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["w4a16", "w3a16 asymmetric"])
def test_a_layer_in_another_layout_is_laid_out_once(name, monkeypatch):
    scheme, _ = SCHEMES[name]
    made = replace(layer(scheme), tensors={})
    encode, calls = PackQuantized.encode, []

    def counted(self, q, **options):
        calls.append(q)
        return encode(self, q, **options)

    monkeypatch.setattr(PackQuantized, "encode", counted)
    check = kernel_for(scheme, SHAPE)
    assert not check_kernel(check, made, device=DEVICE, seed=0).problem
    assert len(calls) == 1


CACHES = {
    "fp8": (KVSpec("fp8_e4m3"), 1),
    "fp8 by head": (KVSpec("fp8_e4m3", "head"), 2),
    "int8": (KVSpec("int8"), 1),
    "int8 by head": (KVSpec("int8", "head"), 2),
    "int4": (KVSpec("int4", "token_head"), 0),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("heads, head_dim", [(6, 16), (2, 80)])
def test_a_step_over_the_cache_agrees_with_float64(name, heads, head_dim, monkeypatch):
    kv, count = CACHES[name]
    shape = AttentionShape(heads=heads, kv_heads=2, head_dim=head_dim)
    scales = (torch.linspace(0.01, 0.3, count), torch.linspace(0.2, 0.02, count)) if count else None
    kernel = cache_kernel(shape, kv)
    options = {"device": DEVICE, "seed": 3}
    found = check_cache("a", shape, kv, scales, **options)
    assert found.kernel == kernel and found.triton and not found.problem
    assert 0 < found.error < 5e-3
    attend = getattr(quantized_cache, kernel)

    def wrong(q, k, v, **given):
        by = "v_params" if kv.element == "int4" else "v_scale"
        return attend(q, k, v, **{**given, by: given[by] * 1.1})

    monkeypatch.setattr(quantized_cache, kernel, wrong)
    assert "attends otherwise" in check_cache("a", shape, kv, scales, **options).problem


def test_a_cache_without_scales_or_kernel():
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=24)
    assert cache_kernel(shape, KVSpec("int8")) is None
    with pytest.raises(InputError, match="no scales"):
        check_cache("a", replace(shape, head_dim=16), KVSpec("int8"), None, device=DEVICE, seed=0)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(),
        Scheme(fp8("block", block=(64, 128)), FP8_GROUP),
        Scheme(fp8("channel"), FP8_GROUP),
        Scheme(qoq(96), TOKEN),
        Scheme(qoq(128), STATIC),
    ],
)
def test_what_no_kernel_multiplies_has_none(scheme):
    """None of these can be asked for by a recipe."""
    assert kernel_for(scheme, SHAPE) is None


def written_schemes():
    """Every kind of scheme that a recipe can ask for, by what asks for it."""
    inputs = (None, "token", "tensor", "static")
    asked = [
        (kind, {"bits": bits, "group_size": group, "symmetric": symmetric, "activations": how})
        for kind in (Rtn, Gptq)
        for bits in range(2, 9)
        for group in (None, 12, 24, 32, 64, 96, 128, 384)
        for symmetric in (True, False)
        for how in inputs
    ]
    asked += [(Awq, {"bits": b, "group_size": g}) for b in range(2, 9) for g in (None, 48, 128)]
    asked += [(Fp8, {"scales": how}) for how in ("dynamic", "static", "block", "weights")]
    asked += [
        (Smoothquant, {"bits": 8, "weights": per, "activations": how})
        for per in ("channel", "tensor")
        for how in inputs[1:]
    ]
    asked += [(Nvfp4, {"activations": how}) for how in ("none", "calibrated", "dynamic")]
    asked += [
        (kind, {"activations": how}) for kind in (Mxfp4, Mxfp8) for how in ("none", "dynamic")
    ]
    asked += [
        (Gptq, {"grid": "nvfp4", "activations": how}) for how in (None, "calibrated", "dynamic")
    ]
    asked += [
        (Progressive, {"group_size": group, "zero": zero})
        for group in (None, 32, 48, 64, 96, 128, 192, 384)
        for zero in (("offset", "subtract") if group else ("offset",))
    ]
    return [
        (f"{kind.__name__} {options}", kind(**options).effects().scheme) for kind, options in asked
    ]


def test_whatever_a_recipe_can_write_has_a_kernel():
    """For each format, every scheme that it accepts."""
    formats = {
        name: get_format(name) for name in format_names() if name not in ("bitdelta", "dense")
    }
    held = dict.fromkeys(formats, 0)
    for name, format in formats.items():
        for asked, scheme in written_schemes():
            spec = scheme.weight
            stored = replace(spec, scale_dtype=format.scale_dtype(spec, torch.bfloat16))
            as_stored = replace(scheme, weight=stored)
            if format.accepts(as_stored, SHAPE) is None:
                held[name] += 1
                assert kernel_for(as_stored, SHAPE) is not None, f"{asked} in {name}"
    assert all(held.values()), held
