"""A checkpoint of quantized weights and inputs opens as what was written, in every format."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.errors import CompressError
from compressor.formats.base import ModelSchemes, get_format
from compressor.formats.shared.e2m1 import LOCAL
from compressor.ir.qtensor import NVFP4, QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.numerics import quantize
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe

BF16, F16, F32, I8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
QOQ = QuantSpec("int", 4, "group", 32, zero="subtract", scale_dtype=I8, second="channel")
CASES = {
    "w8a8": ("compressed-tensors", QuantSpec("int", 8, "channel"), ActivationSpec("int8", "token")),
    "static": (
        "compressed-tensors",
        QuantSpec("int", 8, "tensor"),
        ActivationSpec("int8", "static"),
    ),
    "fp8": ("compressed-tensors", QuantSpec("fp8_e4m3", 8, "block", block=(128, 128)), None),
    "nvfp4": ("compressed-tensors", NVFP4, LOCAL),
    "modelopt-nvfp4": ("modelopt-nvfp4", NVFP4, LOCAL),
    "modelopt-nvfp4a16": ("modelopt-nvfp4", NVFP4, None),
    "modelopt-fp8": (
        "modelopt-fp8",
        QuantSpec("fp8_e4m3", 8, "tensor"),
        ActivationSpec("fp8_e4m3", "static"),
    ),
    "qserve": ("qserve", QOQ, ActivationSpec("int8", "token")),
}


def write(folder, fmt, spec, input, *, kv=None):
    """Quantize every linear of a tiny Llama in place; returns what was written."""
    config = json.loads((folder / "config.json").read_text())
    tensors, written, schemes = load_file(folder / "model.safetensors"), {}, {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        schemes[module] = Scheme(spec, input)
        written[module] = quantize(tensors.pop(name), spec)
        stored = input is not None and input.mode in ("static", "local")
        scale = torch.tensor([0.0078125]) if stored else None
        local = fmt.encode(written[module], model_dtype=F32, input=input, input_scale=scale)
        tensors.update({f"{module}.{key}": tensor for key, tensor in local.items()})
    for module in [name for name in schemes if name.endswith("k_proj")] if kv else []:
        attention, one = module.rpartition(".")[0], torch.tensor([0.5])
        tensors |= fmt.kv_tensors(kv, attention, k_scale=one, v_scale=one * 2, model_dtype=F32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = fmt.config(ModelSchemes({**schemes, "lm_head": Scheme()}, kv))
    (folder / "config.json").write_text(json.dumps(config))
    return written


@pytest.mark.parametrize("name", CASES)
def test_it_opens_as_what_was_written(name, tiny_model, tmp_path):
    format_name, spec, input = CASES[name]
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "out")
    fmt = get_format(format_name)
    written = write(folder, fmt, spec, input)
    source = open_source(folder)
    assert source.quantized and source.format.name == format_name
    found, scales = {}, {}
    for unit in source.layout.units:
        read = source.read_unit(unit)
        found |= read.quantized
        scales |= read.input_scales
    assert set(found) == set(written)
    for module, q in written.items():
        assert source.schemes.linears[module] == Scheme(spec, input)
        assert torch.equal(found[module].codes, q.codes)
        assert torch.equal(found[module].dequantize(), q.dequantize())
    static = input is not None and input.mode in ("static", "local")
    assert {float(s) for s in scales.values()} == ({0.0078125} if static else set())
    assert set(scales) == (set(written) if static else set())


@pytest.mark.parametrize("name", ["static", "nvfp4", "modelopt-fp8", "qserve"])
def test_a_tensor_that_is_missing_is_named(name, tiny_model, tmp_path):
    format_name, spec, input = CASES[name]
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "out")
    write(folder, get_format(format_name), spec, input)
    tensors = load_file(folder / "model.safetensors")
    first = "model.layers.0.self_attn.q_proj."
    for lost in [n for n in tensors if n.startswith(first)]:
        rest = {n: t for n, t in tensors.items() if n != lost}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CompressError, match="q_proj"):
            open_source(folder)


@pytest.mark.parametrize("name", ["nvfp4", "modelopt-nvfp4", "modelopt-fp8"])
def test_scales_of_the_kv_cache_are_read_with_their_block(name, tiny_model, tmp_path):
    format_name, spec, input = CASES[name]
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "out")
    write(folder, get_format(format_name), spec, input, kv=KVSpec("fp8_e4m3"))
    source = open_source(folder)
    assert source.schemes.kv == KVSpec("fp8_e4m3")
    for unit in source.layout.units:
        extra = source.read_unit(unit).extra
        scales = source.format.kv_scales(extra, f"{unit.name}.self_attn")
        if unit.kind == "block":
            assert [float(scale) for scale in scales] == [0.5, 1.0]
        else:
            assert scales is None


def test_scales_of_a_cache_go_with_the_config_that_declared_it(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "out")
    spec = QuantSpec("fp8_e4m3", 8, "block", block=(128, 128))
    write(folder, get_format("compressed-tensors"), spec, None, kv=KVSpec("fp8_e4m3"))
    source = open_source(folder)
    assert source.added
    recipe = {"model": "m", "output": "o", "passes": [{"rtn": {"bits": 8, "group_size": 32}}]}
    plan = make_plan(make_recipe({**recipe, "dequantize_source": True}), source)
    written = {name for unit in plan.units for name in unit.outputs}
    assert not {name for name in written if name.endswith(("k_scale", "v_scale"))}
    assert plan.target.config().get("kv_cache_scheme") is None
    assert any("KV cache are left out" in note for note in plan.notes)
