"""Formats of quantized inputs, floats of 4 and 8 bits, and QServe: exact round trips, a second
reader, configs that lead back to the schemes, and NVFP4 between its two formats."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from compressor.errors import InputError
from compressor.formats.base import ModelSchemes, format_names, get_format
from compressor.formats.relayout import relayout
from compressor.formats.second_reader.decode import decode_linear
from compressor.formats.shared.e2m1 import LOCAL, divisor_of
from compressor.ir.qtensor import E8M0, NVFP4, QTensor
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.ir.tensor import TensorShape
from compressor.numerics import quantize
from tests.support.low_bit_cases import (
    BF16,
    F16,
    F32,
    FORMATS,
    FP8_GROUP,
    FP8_STATIC,
    FP8_TOKEN,
    I8,
    STATIC8,
    TOKEN8,
    cases,
    fp8,
    integers,
    progressive,
    shapes,
)


def weight(spec, shape, *, seed=0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    w *= torch.exp2(torch.randint(-6, 3, (shape[0], 1), generator=generator).float())
    return quantize(w, spec)


def raw(tensor):
    return tensor.view(torch.uint8) if tensor.dtype in (torch.float8_e4m3fn, E8M0) else tensor


def same(a: QTensor, b: QTensor) -> bool:
    pairs = [(a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros), (a.second, b.second)]
    return a.spec == b.spec and all(
        (x is None) == (y is None) and (x is None or torch.equal(raw(x), raw(y))) for x, y in pairs
    )


def as_file_holds(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == BF16:
        return tensor.view(torch.uint16).numpy()
    return raw(tensor).numpy()


def scale_of(input) -> torch.Tensor | None:
    stored = input is not None and input.mode in ("static", "local")
    return torch.tensor([0.01171875]) if stored else None  # bfloat16 has it


@pytest.mark.parametrize("name", FORMATS)
def test_a_round_trip_is_exact_and_as_the_layout_says(name):
    fmt = get_format(name)
    for number, (spec, input, shape) in enumerate(cases(name)):
        q, scale = weight(spec, shape, seed=number), scale_of(input)
        assert fmt.accepts(Scheme(spec, input), shape) is None, (spec, input)
        tensors = fmt.encode(q, model_dtype=BF16, input=input, input_scale=scale)
        assert shapes(tensors) == fmt.layout(spec, shape, model_dtype=BF16, input=input), spec
        assert all(t.is_contiguous() for t in tensors.values()), spec
        assert same(fmt.decode(tensors, spec), q), spec
        found = fmt.input_scale(tensors)
        assert (found is None) == (scale is None)
        if scale is not None:
            assert found.dtype == F32 and found.shape == (1,)
            torch.testing.assert_close(found, scale, rtol=2**-23, atol=0)
        assert fmt.scale_dtype(spec, spec.scale_dtype) == spec.scale_dtype


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_reader_agrees(name):
    fmt = get_format(name)
    for number, (spec, input, shape) in enumerate(cases(name)):
        q = weight(spec, shape, seed=number)
        config = fmt.config(ModelSchemes({"model.a": Scheme(spec, input), "lm_head": Scheme()}))
        tensors = fmt.encode(q, model_dtype=BF16, input=input, input_scale=scale_of(input))
        arrays = {key: as_file_holds(tensor) for key, tensor in tensors.items()}
        found = decode_linear(json.loads(json.dumps(config)), "model.a", arrays)
        # compressed-tensors' global scale is rounded to float32 as a divisor
        rounded = 2**-23 if spec == NVFP4 and name == "compressed-tensors" else 0
        expected = q.dequantize(torch.float64).numpy()
        np.testing.assert_allclose(found.weight, expected, rtol=rounded, atol=0)
        assert np.array_equal(found.codes, q.codes.numpy()), spec
        scales = q.scales.double() * (1 if q.second is None else q.second.double())
        np.testing.assert_allclose(found.scales, scales.numpy(), rtol=rounded, atol=0)
        head = decode_linear(config, "lm_head", {"weight": np.ones((3, 2), np.float16)})
        assert head.codes is None and np.array_equal(head.weight, np.ones((3, 2)))


@pytest.mark.parametrize("name", FORMATS)
def test_the_config_leads_back_to_the_schemes(name):
    fmt, seen = get_format(name), set()
    for spec, input, shape in cases(name):
        schemes = ModelSchemes({"model.a": Scheme(spec, input), "lm_head": Scheme()})
        config = json.loads(json.dumps(fmt.config(schemes)))
        assert [n for n in format_names() if get_format(n).recognises(config)] == [name]
        entries = {
            "model.a": fmt.layout(spec, shape, model_dtype=BF16, input=input),
            "lm_head": {"weight": TensorShape(BF16, (5, 6))},
        }
        assert fmt.schemes(config, entries) == schemes
        seen.add(json.dumps(config))
    assert len(seen) > 1 or name in ("modelopt-fp8", "fp8", "gpt-oss")
    assert fmt.config(ModelSchemes({"a": Scheme()})) == {}
    assert fmt.files(ModelSchemes({"a": Scheme()})) == {}


def test_mixed_precision_names_each_sub_format():
    fmt = get_format("compressed-tensors")
    linears = {
        "l.0.q": Scheme(NVFP4, LOCAL),
        "l.0.down": Scheme(fp8("channel"), FP8_TOKEN),
        "l.1.q": Scheme(integers(), TOKEN8),
        "l.1.down": Scheme(fp8("channel")),
        "lm_head": Scheme(),
    }
    config = fmt.config(ModelSchemes(linears, KVSpec("fp8_e4m3")))
    assert config["format"] == "mixed-precision"
    formats = [group["format"] for group in config["config_groups"].values()]
    assert formats == [
        "nvfp4-pack-quantized",
        "float-quantized",
        "int-quantized",
        "naive-quantized",
    ]
    entries = {
        name: {"weight": TensorShape(BF16, (64, 64))}
        if s.weight is None
        else fmt.layout(s.weight, (64, 64), model_dtype=BF16, input=s.input)
        for name, s in linears.items()
    }
    assert fmt.schemes(config, entries) == ModelSchemes(linears, KVSpec("fp8_e4m3"))


def test_bytes_by_hand():
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 2)
    scales = torch.tensor([[2.0, 0.5]]).to(torch.float8_e4m3fn)
    q = QTensor(NVFP4, codes, scales, second=torch.tensor([[0.25]]))
    ct = get_format("compressed-tensors").encode(
        q, model_dtype=BF16, input=LOCAL, input_scale=torch.tensor([0.125])
    )
    assert ct["weight_packed"][0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert ct["weight_scale"].view(torch.uint8).tolist() == [[0x40, 0x30]]
    assert ct["weight_global_scale"].tolist() == [4.0]
    assert ct["input_global_scale"].tolist() == [8.0]
    mo = get_format("modelopt-nvfp4").encode(
        q, model_dtype=BF16, input=LOCAL, input_scale=torch.tensor([0.125])
    )
    assert mo["weight_scale_2"].item() == 0.25 and mo["input_scale"].item() == 0.125
    assert torch.equal(mo["weight"], ct["weight_packed"])
    int8 = QTensor(
        integers(dtype=F32), torch.tensor([[0, 128, 255]]).to(torch.uint8), torch.ones(1, 1)
    )
    stored = get_format("compressed-tensors").encode(int8, model_dtype=F32, input=TOKEN8)
    assert stored["weight"].tolist() == [[-128, 0, 127]]


@pytest.mark.parametrize("input", [None, LOCAL])
def test_nvfp4_goes_between_its_formats_and_back(input):
    ct, mo = get_format("compressed-tensors"), get_format("modelopt-nvfp4")

    def move(q, source, target):
        return relayout(
            q, source, target, name="a", model_dtype=BF16, allow_rounding=False, input=input
        )

    for seed in range(40):
        q, scale = weight(NVFP4, (8, 32), seed=seed), scale_of(input)
        options = {"model_dtype": BF16, "input": input, "input_scale": scale}
        first = ct.encode(q, **options)
        there, report = move(ct.decode(first, NVFP4), ct, mo)
        assert report is None
        options["input_scale"] = ct.input_scale(first)
        second = mo.encode(there, **options)
        back, report = move(mo.decode(second, NVFP4), mo, ct)
        assert report is None and same(back, q)
        options["input_scale"] = mo.input_scale(second)
        third = ct.encode(back, **options)
        assert torch.equal(first["weight_packed"], second["weight"])
        for name, tensor in first.items():
            assert torch.equal(raw(third[name]), raw(tensor)) or "global" in name, name
        assert torch.equal(raw(first["weight_scale"]), raw(second["weight_scale"]))
        assert torch.equal(1 / third["weight_global_scale"], second["weight_scale_2"].view(1))
        torch.testing.assert_close(
            third["weight_global_scale"], first["weight_global_scale"], rtol=2**-23, atol=0
        )


def test_a_global_scale_that_no_divisor_makes_moves_one_ulp():
    ct, mo = get_format("compressed-tensors"), get_format("modelopt-nvfp4")
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(4000, generator=generator) + 1) * 1e-4
    divisors = divisor_of(values)
    made = divisors.reciprocal()
    ulp = torch.nextafter(values, torch.full_like(values, 1)) - values
    assert bool(((made - values).abs() <= ulp).all())
    moved = values[made != values]
    assert 100 < len(moved) < 2000
    assert torch.equal(divisor_of(made).reciprocal(), made)
    q = replace(weight(NVFP4, (4, 32)), second=moved[:1].view(1, 1))
    with pytest.raises(InputError, match="reciprocal of no float32"):
        ct.encode(q, model_dtype=BF16)
    there, report = relayout(q, mo, ct, name="a", model_dtype=BF16, allow_rounding=False)
    assert report is not None and 0 < report.max_relative_error < 2**-22
    assert "as divisors" in str(report)
    assert torch.equal(there.codes, q.codes)
    assert torch.equal(ct.decode(ct.encode(there, model_dtype=BF16), NVFP4).second, there.second)
    dense, report = relayout(
        q, mo, get_format("dense"), name="a", model_dtype=BF16, allow_rounding=False
    )
    assert report is None and torch.equal(dense.second, q.second)


@pytest.mark.parametrize("input", [STATIC8, FP8_STATIC, LOCAL])
def test_a_static_input_needs_a_positive_scale(input):
    spec = {"int8": integers(), "fp8_e4m3": fp8("channel"), "fp4_e2m1": NVFP4}[input.element]
    fmt, q = get_format("compressed-tensors"), weight(spec, (4, 32))
    for bad in (None, torch.zeros(1), torch.tensor([torch.nan]), torch.tensor([-1.0])):
        with pytest.raises(InputError, match="scale"):
            fmt.encode(q, model_dtype=BF16, input=input, input_scale=bad)


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "said"),
    [
        ("compressed-tensors", Scheme(NVFP4), (4, 24), "blocks of 16"),
        (
            "compressed-tensors",
            Scheme(NVFP4, ActivationSpec("fp4_e2m1", "token")),
            (4, 32),
            "calib",
        ),
        ("compressed-tensors", Scheme(NVFP4, TOKEN8), (4, 32), "no sub-format"),
        ("compressed-tensors", Scheme(progressive("offset"), TOKEN8), (32, 32), "second-level"),
        ("compressed-tensors", Scheme(fp8("channel"), FP8_GROUP), (4, 200), "groups of 128"),
        ("compressed-tensors", Scheme(None, TOKEN8), (4, 32), "the weight is not"),
        ("modelopt-nvfp4", Scheme(fp8("tensor")), (4, 32), "E2M1"),
        ("modelopt-fp8", Scheme(fp8("channel", dtype=F32), FP8_STATIC), (4, 32), "per tensor"),
        ("modelopt-fp8", Scheme(fp8("tensor", dtype=F32)), (4, 32), "static"),
        ("fp8", Scheme(fp8("block", block=(128, 128), dtype=F32)), (128, 128), "E4M3 inputs"),
        (
            "fp8",
            Scheme(fp8("block", block=(128, 128), dtype=F32), FP8_GROUP),
            (128, 200),
            "groups of 128",
        ),
        ("qserve", Scheme(progressive("offset")), (32, 32), "int8"),
        ("qserve", Scheme(progressive("offset"), TOKEN8), (40, 32), "40 outputs"),
        ("qserve", Scheme(progressive("offset", 64), TOKEN8), (32, 96), "groups of 64"),
        ("qserve", Scheme(integers(4, "group", 32, dtype=I8), TOKEN8), (32, 32), "4-bit"),
    ],
)
def test_refusals_before_any_work(name, scheme, shape, said):
    reason = get_format(name).accepts(scheme, shape)
    assert reason is not None and said in reason


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_tensors_are_refused_by_name(name):
    for spec, input, shape in (cases(name)[0], cases(name)[-1]):
        refuse_damage(get_format(name), spec, input, shape)


def refuse_damage(fmt, spec, input, shape):
    config = fmt.config(ModelSchemes({"a": Scheme(spec, input)}))
    options = {"model_dtype": BF16, "input": input, "input_scale": scale_of(input)}
    tensors = fmt.encode(weight(spec, shape), **options)
    for damaged, tensor in tensors.items():
        if damaged.startswith("input"):
            continue
        missing = {k: t for k, t in tensors.items() if k != damaged}
        changes = [missing, {**missing, damaged: tensor.to(torch.complex64)}]
        changes.append({**missing, damaged: torch.cat([tensor.reshape(-1)] * 2)})
        if tensor.dtype in (BF16, F16, F32):
            changes.append({**missing, damaged: torch.full_like(tensor, torch.nan)})
        for change in changes:
            with pytest.raises(InputError):
                fmt.decode(change, spec)
            arrays = {key: as_file_holds(t) for key, t in change.items()}
            with pytest.raises(ValueError) as caught:
                decode_linear(config, "a", arrays)
            assert any(key in str(caught.value) for key in (*tensors, "weight is missing"))


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "modelopt-fp8"])
def test_modelopt_has_one_way_of_quantizing(name):
    fmt = get_format(name)
    spec, input, shape = cases(name)[0]
    schemes = ModelSchemes({"a": Scheme(spec, input), "lm_head": Scheme()}, KVSpec("fp8_e4m3"))
    file = fmt.files(schemes)["hf_quant_config.json"]["quantization"]
    assert file["kv_cache_quant_algo"] == "FP8" and file["exclude_modules"] == ["lm_head"]
    assert file["quant_algo"] == fmt.config(schemes)["quant_algo"]
    with pytest.raises(InputError, match="one way"):
        fmt.config(ModelSchemes({"a": Scheme(spec, input), "b": Scheme(integers())}))
    with pytest.raises(InputError, match="KV cache"):
        fmt.config(replace(schemes, kv=KVSpec("int8")))
    config = fmt.config(schemes)
    coded = fmt.layout(spec, shape, model_dtype=BF16, input=input)
    plain = {"weight": TensorShape(BF16, (4, 4))}
    with pytest.raises(InputError, match="ignores it"):
        fmt.schemes(config, {"a": coded, "lm_head": coded})
    with pytest.raises(InputError, match="a should be"):
        fmt.schemes(config, {"a": plain, "lm_head": plain})
    wild = {**config, "ignore": ["lm_*", "b*"]}
    assert fmt.schemes(wild, {"a": coded, "b.q": plain}).linears["b.q"] == Scheme()


def test_fp8_blocks_lists_what_is_left_alone():
    fmt = get_format("fp8")
    spec, input, shape = cases("fp8")[0]
    schemes = ModelSchemes({"a": Scheme(spec, input), "lm_head": Scheme()})
    config = fmt.config(schemes)
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert config["weight_block_size"] == [128, 128]
    with pytest.raises(InputError, match="KV cache"):
        fmt.config(replace(schemes, kv=KVSpec("fp8_e4m3")))
    coded = fmt.layout(spec, shape, model_dtype=BF16, input=input)
    plain = {"weight": TensorShape(BF16, (4, 4))}
    for entries in ({"a": plain, "lm_head": plain}, {"a": coded, "lm_head": coded}):
        with pytest.raises(InputError, match="says otherwise"):
            fmt.schemes(config, entries)
    with pytest.raises(InputError, match="weight_block_size"):
        fmt.schemes({**config, "weight_block_size": [64, 64]}, {"a": coded})
    assert not fmt.recognises({k: v for k, v in config.items() if k != "producer"})
