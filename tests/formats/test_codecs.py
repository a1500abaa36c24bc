"""Codecs: decode(encode(q)) == q exactly, layouts and configs say what is written."""

import json
from dataclasses import replace

import pytest
import torch

from compressor.errors import InputError
from compressor.formats.base import ModelSchemes, format_names, get_format
from compressor.formats.compressed_tensors.layouts.int_quantized import IntQuantized
from compressor.formats.second_reader.decode import decode_linear
from compressor.formats.shared.words import pack_words
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.ir.tensor import TensorShape
from tests.support.int_weights import same, weight

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

CT_CASES = [
    (bits, strategy, group, zero, shape, dtype)
    for bits in range(1, 9)
    for strategy, group in (("group", 10), ("channel", None), ("tensor", None))
    for zero in ("none", "subtract")
    for shape, dtype in (((7, 70), BF16), ((33, 20), F16), ((1, 10), F32))
]
AWQ_CASES = [
    (4, strategy, group, zero, shape, F16)
    for strategy, group in (("group", 3), ("group", 15), ("channel", None))
    for zero in ("none", "subtract")
    for shape in ((8, 15), (40, 30))
]
GPTQ_CASES = [
    (bits, strategy, group, zero, shape, F16)
    for bits in (2, 3, 4, 8)
    for strategy, group in (("group", 32), ("group", 16), ("channel", None))
    for zero in ("none", "subtract")
    for shape in ((32, 32), (64, 96))
]
CASES = [
    *(("compressed-tensors", *case) for case in CT_CASES),
    *(("autoawq", *case) for case in AWQ_CASES),
    *(("gptq-v2", *case) for case in GPTQ_CASES),
    *(("gptq", *case) for case in GPTQ_CASES if case[3] == "none"),
]


def shapes(tensors):
    return {name: TensorShape(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq", "gptq", "gptq-v2"])
def test_a_round_trip_is_exact_and_as_the_layout_says(name):
    for format_name, *case in CASES:
        if format_name != name:
            continue
        fmt, q = get_format(name), weight(*case)
        assert fmt.accepts(Scheme(weight=q.spec), q.shape) is None, case
        tensors = fmt.encode(q, model_dtype=F16)
        assert shapes(tensors) == fmt.layout(q.spec, q.shape, model_dtype=F16), case
        assert all(t.is_contiguous() for t in tensors.values()), case
        assert same(fmt.decode(tensors, q.spec), q), case


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq", "gptq", "gptq-v2"])
def test_the_config_leads_back_to_the_schemes(name):
    seen = set()
    for format_name, *case in CASES:
        if format_name != name:
            continue
        fmt, q = get_format(name), weight(*case)
        linears = {"model.a": Scheme(weight=q.spec), "lm_head": Scheme()}
        config = json.loads(json.dumps(fmt.config(ModelSchemes(linears=linears))))
        entries = {
            "model.a": fmt.layout(q.spec, q.shape, model_dtype=F16),
            "lm_head": {"weight": TensorShape(F16, (5, 6))},
        }
        assert fmt.recognises(config)
        assert [n for n in format_names() if get_format(n).recognises(config)] == [name]
        found = fmt.schemes(config, entries).linears
        # AutoAWQ always stores zero points, so a symmetric weight comes back with them.
        spec = replace(q.spec, zero="subtract") if name == "autoawq" else q.spec
        assert found == {"model.a": Scheme(weight=spec), "lm_head": Scheme()}
        seen.add(json.dumps(config))
    assert len(seen) > 1


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_files_from_before_elements_crossed_words(bits):
    fmt, q = (
        get_format("compressed-tensors"),
        weight(bits, "group", 32, "subtract", (160, 192), F16),
    )
    tensors = fmt.encode(q, model_dtype=F16)
    old = {
        **tensors,
        "weight_packed": pack_words(q.codes, bits, crossing=False),
        "weight_zero_point": pack_words(q.zeros.t(), bits, crossing=False).t().contiguous(),
    }
    assert old["weight_packed"].shape != tensors["weight_packed"].shape
    assert same(fmt.decode(old, q.spec), q)
    config = fmt.config(ModelSchemes(linears={"a": Scheme(weight=q.spec)}))
    arrays = {name: tensor.numpy() for name, tensor in old.items()}
    found = decode_linear(config, "a", arrays)
    assert torch.equal(torch.from_numpy(found.weight), q.dequantize(torch.float64))


def test_known_bytes():
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 1)
    spec = QuantSpec("int", 4, "group", 8, zero="none", scale_dtype=F16)
    q = QTensor(spec, codes, torch.ones(8, 2, dtype=F16))
    ct = get_format("compressed-tensors").encode(q, model_dtype=F16)["weight_packed"]
    assert ct[0].tolist() == [0x76543210, 0xFEDCBA98 - 2**32]
    v1, v2 = (get_format(n).encode(q, model_dtype=F16) for n in ("gptq", "gptq-v2"))
    assert v1["qweight"][:, 0].tolist() == ct[0].tolist()
    assert {w & 0xFFFFFFFF for w in v1["qzeros"].flatten().tolist()} == {0x77777777}
    assert {w & 0xFFFFFFFF for w in v2["qzeros"].flatten().tolist()} == {0x88888888}
    assert v1["g_idx"].tolist() == [0] * 8 + [1] * 8
    columns = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 16)  # code = output number
    awq = get_format("autoawq").encode(replace(q, codes=columns), model_dtype=F16)
    assert set(awq["qweight"].flatten().tolist()) == {0x75316420}


def test_dense_is_the_dequantized_weight_rounded_once():
    q = weight(4, "group", 10, "subtract", (7, 70), F16)
    fmt = get_format("dense")
    for dtype in (BF16, F16, F32):
        assert fmt.model_dtype(dtype) == dtype
        tensors = fmt.encode(q, model_dtype=dtype)
        assert shapes(tensors) == fmt.layout(q.spec, q.shape, model_dtype=dtype)
        assert torch.equal(tensors["weight"], q.dequantize(F32).to(dtype))
    assert fmt.config(ModelSchemes(linears={"a": Scheme(weight=q.spec)})) == {}
    with pytest.raises(InputError, match="holds no codes"):
        fmt.decode(tensors, q.spec)
    huge = replace(q, scales=torch.full_like(q.scales, 60000.0))
    with pytest.raises(InputError, match="not finite"):
        fmt.encode(huge, model_dtype=F16)


def test_mixed_precision_groups_name_their_modules():
    fmt = get_format("compressed-tensors")
    four = QuantSpec("int", 4, "group", 32, scale_dtype=BF16)
    eight = QuantSpec("int", 8, "channel", scale_dtype=BF16)
    linears = {
        "l.0.q": Scheme(weight=four),
        "l.0.gate": Scheme(),
        "l.1.q": Scheme(weight=eight),
        "l.10.q": Scheme(weight=four),
        "lm_head": Scheme(),
    }
    config = fmt.config(ModelSchemes(linears=linears))
    groups = config["config_groups"]
    assert [g["targets"] for g in groups.values()] == [["l.0.q", "l.10.q"], ["l.1.q"]]
    assert config["ignore"] == ["l.0.gate", "lm_head"]
    assert config["format"] == "pack-quantized"  # the groups agree on it
    entries = {
        name: fmt.layout(s.weight, (64, 64), model_dtype=BF16)
        if s.weight
        else {"weight": TensorShape(BF16, (64, 64))}
        for name, s in linears.items()
    }
    assert fmt.schemes(config, entries) == ModelSchemes(linears=linears)


def test_a_config_from_elsewhere_with_patterns():
    fmt = get_format("compressed-tensors")
    spec = QuantSpec("int", 4, "group", 32, zero="subtract", scale_dtype=BF16)
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["re:.*[qv]$"], "weights": weights}},
        "ignore": ["re:.*\\.1\\..*"],
    }
    packed, plain = fmt.layout(spec, (64, 64), model_dtype=BF16), {"weight": TensorShape(BF16, ())}
    entries = {"l.0.q": packed, "l.0.k": plain, "l.1.q": plain, "l.2.v": packed}
    found = fmt.schemes(config, entries).linears
    assert [name for name, scheme in found.items() if scheme.weight == spec] == ["l.0.q", "l.2.v"]
    with pytest.raises(InputError, match=r"l\.0\.k holds quantized tensors"):
        fmt.schemes(config, {**entries, "l.0.k": packed})
    with pytest.raises(InputError, match=r"l\.0\.q should be pack-quantized"):
        fmt.schemes(config, {**entries, "l.0.q": plain})


def test_kv_cache_entries():
    fmt = get_format("compressed-tensors")
    for kv in (KVSpec("fp8_e4m3"), KVSpec("fp8_e4m3", per="head"), KVSpec("int8")):
        config = fmt.config(ModelSchemes(linears={}, kv=kv))
        assert fmt.schemes(config, {}).kv == kv
    with pytest.raises(InputError, match="int4"):
        fmt.config(ModelSchemes(linears={}, kv=KVSpec("int4", per="token_head")))
    spec = QuantSpec("int", 4, "group", 32, scale_dtype=F16)
    with_kv = ModelSchemes(linears={"a": Scheme(weight=spec)}, kv=KVSpec("fp8_e4m3"))
    for name in ("autoawq", "gptq", "gptq-v2", "dense"):
        with pytest.raises(InputError, match="KV cache"):
            get_format(name).config(with_kv)


def test_nothing_quantized_is_no_config():
    for name in ("compressed-tensors", "autoawq", "gptq", "gptq-v2", "dense"):
        assert get_format(name).config(ModelSchemes(linears={"a": Scheme()})) == {}


APPENDIX = {  # what llm-compressor wrote for one projection of 128 outputs and 256 inputs
    True: {
        "weight_packed": TensorShape(torch.int32, (128, 32)),
        "weight_scale": TensorShape(BF16, (128, 2)),
        "weight_shape": TensorShape(torch.int64, (2,)),
    },
    False: {
        "weight_packed": TensorShape(torch.int32, (128, 32)),
        "weight_scale": TensorShape(BF16, (128, 2)),
        "weight_shape": TensorShape(torch.int64, (2,)),
        "weight_zero_point": TensorShape(torch.int32, (16, 2)),
    },
}


def test_a_quantized_head_is_named():
    """vLLM looks for it by name, or by a word of the config, and not by its class."""
    spec = QuantSpec("int", 4, "group", 32, zero="subtract", scale_dtype=F16)
    every = dict.fromkeys(("model.layers.0.mlp.up_proj", "lm_head"), Scheme(weight=spec))
    apart = {**every, "lm_head": Scheme()}
    for name, said in (("autoawq", True), ("gptq", True)):
        config = get_format(name).config
        assert config(ModelSchemes(linears=every)).get("lm_head") is said
        assert not config(ModelSchemes(linears=apart)).get("lm_head")
    groups = get_format("compressed-tensors").config(ModelSchemes(linears=every))["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear", "lm_head"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_names_and_config_as_another_writer(symmetric):
    fmt = get_format("compressed-tensors")
    zero = "none" if symmetric else "subtract"
    spec = QuantSpec("int", 4, "group", 128, zero=zero, scale_dtype=BF16)
    assert fmt.layout(spec, (128, 256), model_dtype=BF16) == APPENDIX[symmetric]
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    linears = {**{name: Scheme(weight=spec) for name in names}, "lm_head": Scheme()}
    config = fmt.config(ModelSchemes(linears=linears))
    group = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 128,
        "num_bits": 4,
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": symmetric,
        "type": "int",
    }
    written = config["config_groups"]["group_0"]
    assert written["weights"].pop("observer") == "minmax"
    assert written == {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": group,
    }
    del config["config_groups"]
    assert config == {
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


def test_integers_beside_inputs_that_were_written_unpacked_are_read() -> None:
    fmt, inputs = get_format("compressed-tensors"), ActivationSpec("int8", "token")
    spec = QuantSpec("int", 4, "group", 16, scale_dtype=torch.bfloat16)
    codes = torch.randint(0, 16, (8, 32), dtype=torch.uint8)
    q = QTensor(spec=spec, codes=codes, scales=torch.rand(8, 2).bfloat16())
    unpacked = IntQuantized().encode(q, input=inputs, input_scale=None)
    headers = {n: TensorShape(t.dtype, tuple(t.shape)) for n, t in unpacked.items()}
    stored = fmt.stored(headers, Scheme(spec, inputs), (8, 32), model_dtype=torch.bfloat16)
    assert stored == headers
    assert torch.equal(fmt.decode(unpacked, spec).codes, codes)
    assert "weight_packed" in fmt.encode(q, model_dtype=torch.bfloat16, input=inputs)
