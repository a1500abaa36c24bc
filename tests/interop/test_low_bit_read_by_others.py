"""transformers with compressed-tensors runs what we write, quantized inputs included."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from compressor.formats.base import ModelSchemes, get_format
from compressor.formats.relayout import relayout
from compressor.formats.shared.e2m1 import LOCAL
from compressor.ir.qtensor import NVFP4, QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.numerics import quantize
from compressor.numerics.activations import fake_quantize_activation
from compressor.numerics.nvfp4 import shared_absmax

pytestmark = pytest.mark.interop

BF16, F32 = torch.bfloat16, torch.float32
WIDE = {"hidden_size": 128, "intermediate_size": 256}
LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0, "fp4_e2m1": 2688.0}
IDS = torch.arange(4, 100).reshape(2, 48)
KV = KVSpec("fp8_e4m3")


def int8(strategy="channel"):
    return QuantSpec("int", 8, strategy, scale_dtype=F32)


def fp8(strategy, block=None):
    return QuantSpec("fp8_e4m3", 8, strategy, block=block, scale_dtype=F32)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def linears(model) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def input_absmax(model) -> dict[str, float]:
    """Largest magnitude that enters each linear."""
    seen: dict[str, float] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, float(args[0].abs().max()))
        )
        for name, module in linears(model).items()
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return seen


def quantized(model, spec, *, rule=None) -> dict[str, QTensor]:
    """Every linear but the head; q/k/v and gate/up share NVFP4's global scale."""
    found = {}
    for name, module in linears(model).items():
        if name == "lm_head":
            continue
        options = {}
        if rule is not None:
            parent, _, leaf = name.rpartition(".")
            group = {"q_proj", "k_proj", "v_proj"} if leaf[0] in "qkv" else {"gate_proj", "up_proj"}
            names = [f"{parent}.{other}" for other in group] if leaf in group else [name]
            weights = [model.get_submodule(n).weight.detach() for n in names]
            options = {"rule": rule, "amax": shared_absmax(weights)}
        found[name] = quantize(module.weight.detach(), spec, **options)
    return found


def write(source, folder, fmt, weights, *, dtype, input=None, absmax=None, kv=None):
    """The checkpoint of `source` with quantized weights; returns the stored input scales."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tensors, scales = dict(model.state_dict()), {}
    schemes = {name: Scheme() for name in linears(model)}
    for name, q in weights.items():
        schemes[name] = Scheme(q.spec, input)
        scale = None
        if input is not None and input.mode in ("static", "local"):
            scale = torch.tensor([absmax[name] / LARGEST[input.element]])
        local = fmt.encode(q, model_dtype=dtype, input=input, input_scale=scale)
        scales[name] = fmt.input_scale(local)
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{key}": tensor for key, tensor in local.items()})
    if kv is not None:
        for i in range(model.config.num_hidden_layers):
            scale = torch.tensor([0.02])
            tensors |= fmt.kv_tensors(
                kv,
                f"model.layers.{i}.self_attn",
                k_scale=scale,
                v_scale=scale,
                model_dtype=dtype,
            )
    shutil.copytree(source, folder)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = fmt.config(ModelSchemes(schemes, kv))
    (folder / "config.json").write_text(json.dumps(config))
    return scales


def reference(source, weights, *, dtype, inputs=None):
    """Our own model: dequantized weights, and `inputs(name, x)` in front of each linear."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    for name, module in linears(model).items():
        if name in weights:
            module.weight.data = weights[name].dequantize(dtype)
            if inputs is not None:
                module.register_forward_pre_hook(
                    lambda _, args, name=name: (inputs(name, args[0]),)
                )
    return model


def finer_int8(x: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
    """Dynamic int8 as compressed-tensors simulates it: 127.5 steps to the absmax, where kernels
    have 127."""
    dims = -1 if spec.mode == "token" else (-3, -2, -1)
    scale = x.abs().amax(dims, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


@pytest.fixture(scope="module")
def source(tiny_models, tmp_path_factory):
    """source(dtype) → folder of a tiny Llama, wide enough for a whole block of 128."""
    built = {}

    def get(dtype):
        if dtype not in built:
            folder = tmp_path_factory.mktemp("llama") / "model"
            built[dtype] = tiny_models.build("llama", folder, dtype=dtype, **WIDE)
        return built[dtype]

    return get


CASES = {
    "w8a8-token": (int8(), ActivationSpec("int8", "token")),
    "w8a8-tensor": (int8("tensor"), ActivationSpec("int8", "tensor")),
    "w8a8-static": (int8("tensor"), ActivationSpec("int8", "static")),
    "fp8-dynamic": (fp8("channel"), ActivationSpec("fp8_e4m3", "token")),
    "fp8-static": (fp8("tensor"), ActivationSpec("fp8_e4m3", "static")),
    "fp8-block": (fp8("block", (128, 128)), ActivationSpec("fp8_e4m3", "group", 128)),
    "fp8-weights": (fp8("channel"), None),
}


@pytest.mark.parametrize("name", CASES)
def test_eight_bits_give_the_same_logits(name, source, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    spec, input = CASES[name]
    folder = source(F32)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=F32).eval()
    weights = quantized(original, spec)
    absmax = input_absmax(original)
    fmt = get_format("compressed-tensors")
    scales = write(folder, tmp_path / "out", fmt, weights, dtype=F32, input=input, absmax=absmax)

    def ours(module, x):
        return fake_quantize_activation(x, input, scales[module])

    def theirs(module, x):
        dynamic = input.element == "int8" and input.mode != "static"
        return finer_int8(x, input) if dynamic else ours(module, x)

    expected = logits(reference(folder, weights, dtype=F32, inputs=theirs if input else None))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=F32)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    float_weights = logits(reference(folder, weights, dtype=F32))
    base, own = logits(original), expected
    if input is not None:
        assert float((expected - float_weights).abs().max()) > 1e-3
        own = logits(reference(folder, weights, dtype=F32, inputs=ours))
    errors = [float((x - base).square().mean().sqrt()) for x in (own, expected)]
    assert 0 < errors[0] < 0.3 * float(base.std())
    assert errors[0] < 1.5 * errors[1] and errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("rule", ["static_6", "mse"])
@pytest.mark.parametrize("input", [None, LOCAL], ids=["nvfp4a16", "w4a4"])
@pytest.mark.parametrize("kv", [None, KV], ids=["", "fp8kv"])
def test_nvfp4_gives_the_same_logits(rule, input, kv, source, tmp_path):
    """Their weights become bfloat16 from code · (scale / divisor), ours from code · scale · second:
    equal but for ties. With those weights, float32 logits with quantized inputs are compared.
    """
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    folder, fmt = source(BF16), get_format("compressed-tensors")
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16).eval()
    weights = quantized(original, NVFP4, rule=rule)
    absmax = input_absmax(original)
    out = tmp_path / "out"
    scales = write(folder, out, fmt, weights, dtype=BF16, input=input, absmax=absmax, kv=kv)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=BF16)
    logits(loaded)  # which decompresses the weights

    def ours(module, x):
        return fake_quantize_activation(x, input, scales[module])

    model = reference(folder, weights, dtype=BF16, inputs=ours if input else None)
    base = logits(original)
    for name, module in linears(model).items():
        theirs = loaded.get_submodule(name).weight.detach()
        off = theirs != module.weight
        assert float(off.float().mean()) < 0.2
        torch.testing.assert_close(theirs, module.weight.detach(), rtol=2**-7, atol=0)
        module.weight.data = theirs.clone()
    if kv is not None:
        return  # the simulated cache has steps of its own; that it loads and runs is shown
    model.float()
    torch.nn.Module.float(loaded)  # transformers' own refuses quantized models
    expected, found = logits(model), logits(loaded)
    error = float((expected - base).square().mean().sqrt())
    assert 0.02 < error < 0.7 * float(base.std())
    difference = float((found - expected).square().mean().sqrt())
    assert difference < (0.02 * error if input else 1e-5)


def test_kv_scales_are_where_they_look_for_them(source, tmp_path, attention_they_know):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    folder, fmt = source(F32), get_format("compressed-tensors")
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=F32)
    weights = quantized(original, fp8("channel"))
    write(folder, tmp_path / "out", fmt, weights, dtype=F32, kv=KV)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=F32)
    for i in range(original.config.num_hidden_layers):
        attention = loaded.get_submodule(f"model.layers.{i}.self_attn")
        for name in ("k_scale", "v_scale"):
            assert getattr(attention, name).flatten().tolist() == pytest.approx([0.02])


@pytest.mark.parametrize("input", [LOCAL])
def test_their_converter_makes_our_file_of_our_modelopt_file(input, source):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

    ct, mo = get_format("compressed-tensors"), get_format("modelopt-nvfp4")
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    q = quantize(weight, NVFP4, rule="mse")
    options = {"model_dtype": BF16, "input": input, "input_scale": torch.tensor([0.003])}
    ours = {f"model.a.{n}": t for n, t in mo.encode(q, **options).items()}
    converter = ModelOptNvfp4Converter(targets=["re:.*model.a$"])
    theirs = converter.process(dict(ours))
    there, _ = relayout(
        mo.decode({n[8:]: t for n, t in ours.items()}, NVFP4),
        mo,
        ct,
        name="a",
        model_dtype=BF16,
        allow_rounding=False,
        input=input,
    )
    expected = {f"model.a.{n}": t for n, t in ct.encode(there, **options).items()}
    assert set(theirs) == set(expected)
    for name, tensor in expected.items():
        if "global" in name:
            found = theirs[name].reshape(1)
            torch.testing.assert_close(found, tensor, rtol=2**-23, atol=0)
        else:
            found, tensor = (t.view(torch.uint8) for t in (theirs[name], tensor))
            assert torch.equal(found, tensor), name
