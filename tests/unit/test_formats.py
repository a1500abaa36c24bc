"""Codecs: decode(encode(q)) == q exactly, layouts and configs say what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from compressor.errors import InputError
from compressor.formats.base import Format, ModelSchemes, TensorShape, format_names, get_format
from compressor.formats.packing.words import pack_words
from compressor.independent import decode_linear
from compressor.qtensor import QTensor, QuantSpec
from compressor.scheme import ActivationSpec, KVSpec, Scheme

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


def weight(bits, strategy, group, zero, shape, dtype, *, seed=0):
    """A QTensor that has every code, both ends of the zero points and scales of all magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(
        element="int", bits=bits, strategy=strategy, group_size=group, zero=zero, scale_dtype=dtype
    )
    groups = spec.scale_shape(*shape)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    codes[0, :] = 2**bits - 1
    codes[-1, : shape[1] // 2] = 0
    exponents = torch.randint(-10, 4, groups, generator=generator)
    scales = (torch.rand(groups, generator=generator) + 1) * torch.exp2(exponents.float())
    zeros = None
    if zero == "subtract":
        zeros = torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8)
        zeros.view(-1)[0], zeros.view(-1)[-1] = 0, 2**bits - 1
    return QTensor(spec=spec, codes=codes, scales=scales.to(dtype), zeros=zeros)


def shapes(tensors):
    return {name: TensorShape(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def same(a: QTensor, b: QTensor) -> bool:
    return (
        a.spec == b.spec
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and (a.zeros is None) == (b.zeros is None)
        and (a.zeros is None or torch.equal(a.zeros, b.zeros))
    )


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({"transform_config": {"a": 1}}, "transform_config"),
        ({"config_groups": {"g": {"targets": ["Linear"], "output_activations": {}}}}, "output_act"),
        ({"config_groups": {"g": ["Linear"]}}, "config_groups.g"),
        ({"config_groups": None}, "config_groups"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "int"}}, "kv_cache_scheme"),
        ({"ignore": ["re:("]}, "regular expression"),
    ],
)
def test_what_a_config_declares_beyond_us_is_refused_by_key(change, said):
    fmt = get_format("compressed-tensors")
    spec = QuantSpec("int", 4, "group", 32, scale_dtype=BF16)
    config = {**fmt.config(ModelSchemes(linears={"a": Scheme(weight=spec)})), **change}
    with pytest.raises(InputError, match=said):
        fmt.schemes(config, {"a": fmt.layout(spec, (32, 32), model_dtype=BF16)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"actorder": "group"}, "actorder"),
        ({"num_bits": 9}, "num_bits"),
        ({"num_bits": "4"}, "num_bits"),
        ({"group_size": 0}, "group_size"),
        ({"type": "float"}, "float"),
        ({"strategy": "tensor_group"}, "strategy"),
    ],
)
def test_a_weight_entry_beyond_us_is_refused_by_key(change, said):
    fmt = get_format("compressed-tensors")
    spec = QuantSpec("int", 4, "group", 32, scale_dtype=BF16)
    config = fmt.config(ModelSchemes(linears={"a": Scheme(weight=spec)}))
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(InputError, match=said):
        fmt.schemes(config, {"a": fmt.layout(spec, (32, 32), model_dtype=BF16)})


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


@pytest.mark.parametrize("name", ["autoawq", "gptq", "gptq-v2"])
def test_one_bit_width_and_group_size_per_checkpoint(name):
    a, b = (QuantSpec("int", 4, "group", size, scale_dtype=F16) for size in (32, 64))
    with pytest.raises(InputError, match="one bit width and group size"):
        get_format(name).config(
            ModelSchemes(linears={"a": Scheme(weight=a), "b": Scheme(weight=b)})
        )


def test_names_that_loaders_would_confuse():
    spec = Scheme(weight=QuantSpec("int", 4, "group", 32, scale_dtype=F16))
    linears = {"l.0.mlp.gate": Scheme(), "l.0.mlp.gate_proj": spec, "lm_head": Scheme()}
    with pytest.raises(InputError, match="gate_proj"):
        get_format("autoawq").config(ModelSchemes(linears=linears))
    config = get_format("gptq").config(ModelSchemes(linears=linears))
    assert list(config["dynamic"]) == ["-:^l\\.0\\.mlp\\.gate$"]
    assert config["lm_head"] is False


@pytest.mark.parametrize(
    ("name", "change", "shape", "said"),
    [
        ("compressed-tensors", {"bits": 9}, (32, 32), "9 bits"),
        ("compressed-tensors", {"zero": "offset"}, (32, 32), "zero points"),
        ("compressed-tensors", {"second": "channel"}, (32, 32), "second-level"),
        ("compressed-tensors", {"strategy": "block", "block": (16, 16)}, (32, 32), "blocks"),
        ("compressed-tensors", {"group_size": 24}, (32, 32), "do not divide"),
        ("autoawq", {"bits": 3}, (32, 32), "4 bits, not 3"),
        ("autoawq", {"strategy": "tensor"}, (32, 32), "per tensor"),
        ("autoawq", {}, (36, 32), "36 outputs"),
        ("gptq-v2", {"bits": 5}, (32, 32), "not 5"),
        ("gptq-v2", {"bits": 3, "group_size": 8}, (32, 40), "40 inputs of 3 bits"),
        ("gptq-v2", {}, (36, 32), "36 outputs of 4 bits"),
    ],
)
def test_refusals_before_any_work(name, change, shape, said):
    spec = replace(QuantSpec("int", 4, "group", 32, scale_dtype=F16), **change)
    reason = get_format(name).accepts(Scheme(weight=spec), shape)
    assert reason is not None and said in reason


@pytest.mark.parametrize("name", ["autoawq", "gptq", "gptq-v2", "dense"])
def test_quantized_inputs_are_refused_here_and_float_linears_taken(name):
    scheme = Scheme(
        weight=QuantSpec("int", 4, "group", 32, scale_dtype=F16),
        input=ActivationSpec("fp8_e4m3", "token"),
    )
    assert get_format(name).accepts(scheme, (32, 32))
    assert get_format(name).accepts(Scheme(), (31, 33)) is None


def fmt_and_weight(name) -> tuple[Format, QTensor]:
    return get_format(name), weight(4, "group", 32, "none", (32, 64), F16)


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq", "gptq", "gptq-v2"])
def test_values_that_break_the_spec_are_not_written(name):
    fmt, q = fmt_and_weight(name)
    scales = q.scales.clone()
    scales[0, 0] = torch.nan
    for broken, said in (
        (replace(q, scales=scales), "NaN"),
        (replace(q, codes=torch.full_like(q.codes, 16)), "codes"),
        (replace(q, scales=q.scales[:, :1]), "scales"),
        (replace(q, scales=q.scales.float()), "scales"),
        (replace(q, zeros=torch.zeros(32, 2, dtype=torch.uint8)), "zero points"),
    ):
        with pytest.raises(InputError, match=said):
            fmt.encode(broken, model_dtype=F16)


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq", "gptq", "gptq-v2"])
def test_every_damaged_tensor_is_named(name):
    fmt, q = fmt_and_weight(name)
    tensors = fmt.encode(q, model_dtype=F16)
    for damaged, tensor in tensors.items():
        changes = [tensor.to(torch.float64), torch.cat([tensor, tensor]), tensor[:-1]]
        if tensor.is_floating_point():
            changes.append(torch.full_like(tensor, torch.inf))
        for change in changes:
            with pytest.raises(InputError) as caught:
                fmt.decode({**tensors, damaged: change}, q.spec)
            assert any(f"'{n}'" in str(caught.value) for n in tensors)
    for missing in set(tensors) - {"g_idx"}:
        with pytest.raises(InputError, match=missing):
            fmt.decode({k: v for k, v in tensors.items() if k != missing}, q.spec)


def test_gptq_version_1_and_a_zero_point_of_0():
    spec = QuantSpec("int", 4, "group", 32, zero="subtract", scale_dtype=F16)
    q = replace(weight(4, "group", 32, "subtract", (32, 64), F16), spec=spec)
    v1 = get_format("gptq")
    assert v1.accepts(Scheme(weight=spec), (32, 64)) is None
    assert "gptq-v2" in (v1.may_lack(Scheme(weight=spec)) or "")
    assert get_format("gptq-v2").may_lack(Scheme(weight=spec)) is None
    with pytest.raises(InputError, match="zero points of 0"):
        v1.encode(q, model_dtype=F16)
    shifted = replace(q, zeros=q.zeros.clamp(min=1))
    assert same(v1.decode(v1.encode(shifted, model_dtype=F16), spec), shifted)
    stored = v1.encode(shifted, model_dtype=F16)
    with pytest.raises(InputError, match="qzeros"):
        v1.decode({**stored, "qzeros": torch.full_like(stored["qzeros"], -1)}, spec)


def test_an_order_of_inputs_is_refused_not_misread():
    fmt, q = fmt_and_weight("gptq-v2")
    tensors = fmt.encode(q, model_dtype=F16)
    order = tensors["g_idx"].flip(0)
    with pytest.raises(InputError, match="g_idx"):
        fmt.decode({**tensors, "g_idx": order}, q.spec)
    without = {name: t for name, t in tensors.items() if name != "g_idx"}
    assert same(fmt.decode(without, q.spec), q)
    ct = get_format("compressed-tensors")
    packed = ct.encode(q, model_dtype=F16)
    assert same(ct.decode({**packed, "weight_g_idx": tensors["g_idx"]}, q.spec), q)
    with pytest.raises(InputError, match="weight_g_idx"):
        ct.decode({**packed, "weight_g_idx": order}, q.spec)


def test_zero_points_off_the_centre_do_not_pass_as_symmetric():
    q = weight(4, "group", 32, "subtract", (32, 64), F16)
    for name in ("autoawq", "gptq-v2"):
        fmt = get_format(name)
        with pytest.raises(InputError, match="qzeros"):
            fmt.decode(fmt.encode(q, model_dtype=F16), replace(q.spec, zero="none"))


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


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(InputError) as caught:
        get_format("awq")
    assert "autoawq" in (caught.value.hint or "")
