"""Scales of a quantized KV cache in each format, and the formats that have no place for them."""

import json

import pytest
import torch

from compressor.errors import InputError
from compressor.formats.base import ModelSchemes, get_format
from compressor.ir.scheme import KVSpec, Scheme
from tests.support.low_bit_cases import BF16, F16, F32, TOKEN8, cases, progressive, shapes

KV_CASES = [
    ("compressed-tensors", KVSpec("fp8_e4m3"), (1,), BF16),
    ("compressed-tensors", KVSpec("int8"), (1,), BF16),
    ("compressed-tensors", KVSpec("fp8_e4m3", "head"), (3, 1, 1), BF16),
    ("modelopt-nvfp4", KVSpec("fp8_e4m3"), (), F32),
    ("modelopt-fp8", KVSpec("fp8_e4m3"), (), F32),
]


@pytest.mark.parametrize(("name", "kv", "shape", "dtype"), KV_CASES)
def test_scales_of_the_kv_cache(name, kv, shape, dtype):
    fmt = get_format(name)
    k, v = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([1.0, 4.0, 0.125])
    if kv.per == "tensor":
        k, v = k[:1], v[:1]
    options = {"k_scale": k, "v_scale": v, "model_dtype": BF16}
    tensors = fmt.kv_tensors(kv, "model.layers.0.self_attn", **options)
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert {tuple(t.shape) for t in tensors.values()} == {shape}
    found = fmt.kv_scales(tensors, "model.layers.0.self_attn")
    assert torch.equal(found[0], k) and torch.equal(found[1], v)
    assert fmt.kv_scales(tensors, "model.layers.1.self_attn") is None
    for missing in tensors:
        with pytest.raises(InputError, match="missing"):
            fmt.kv_scales({k: t for k, t in tensors.items() if k != missing}, missing[:24])
    meta = {key: t.to("meta") if isinstance(t, torch.Tensor) else t for key, t in options.items()}
    assert shapes(fmt.kv_tensors(kv, "model.layers.0.self_attn", **meta)) == shapes(tensors)
    spec, input, _ = cases(name)[-1]
    schemes = ModelSchemes({"a": Scheme(spec, input)}, kv)
    entries = {"a": fmt.layout(spec, (32, 64), model_dtype=BF16, input=input)}
    assert fmt.schemes(json.loads(json.dumps(fmt.config(schemes))), entries) == schemes


@pytest.mark.parametrize("name", ["autoawq", "gptq", "gptq-v2", "dense", "qserve"])
def test_formats_without_kv_scales_refuse_them(name):
    with pytest.raises(InputError, match="KV cache"):
        get_format(name).kv_tensors(
            KVSpec("fp8_e4m3"),
            "a",
            k_scale=torch.ones(1),
            v_scale=torch.ones(1),
            model_dtype=F16,
        )
    assert get_format(name).kv_scales({}, "a") is None


def test_qserve_says_that_the_kv_cache_has_four_bits():
    fmt, kv = get_format("qserve"), KVSpec("int4", "token_head")
    schemes = ModelSchemes({"a": Scheme(progressive("offset"), TOKEN8)}, kv)
    config = json.loads(json.dumps(fmt.config(schemes)))
    layout = fmt.layout(progressive("offset"), (32, 64), model_dtype=F16)
    assert fmt.schemes(config, {"a": layout}) == schemes
    with pytest.raises(InputError, match="KV cache"):
        fmt.config(ModelSchemes(schemes.linears, KVSpec("int8")))
    for key, value in (
        ("bits", 8),
        ("zero", "none"),
        ("group_scale_order", [0]),
        ("group_size", 0),
    ):
        with pytest.raises(InputError, match=key):
            fmt.schemes({**config, key: value}, {"a": layout})
