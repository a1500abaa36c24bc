"""Packages that are not ours read what we write, to the same weights and logits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.formats.base import Format, ModelSchemes, get_format
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme

pytestmark = pytest.mark.interop

BF16, F16 = torch.bfloat16, torch.float16


def rounded(weight: torch.Tensor, spec: QuantSpec) -> QTensor:
    """Round a weight [out, in] to the nearest code of plain min-max scales."""
    rows, columns = weight.shape
    groups = spec.scale_shape(rows, columns)
    view = (
        weight.float().reshape(*groups, -1)
        if groups != (1, 1)
        else weight.float().reshape(1, 1, -1)
    )
    top = 2**spec.bits - 1
    low, high = view.amin(-1).clamp(max=0), view.amax(-1).clamp(min=0)
    if spec.symmetric:
        scales = (torch.maximum(-low, high) / (top / 2)).to(spec.scale_dtype)
        zeros = torch.full(groups, (top + 1) / 2)
    else:
        scales = ((high - low) / top).to(spec.scale_dtype)
        zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (view / scales.float()[..., None]).round() + zeros[..., None]
    return QTensor(
        spec=spec,
        codes=codes.clamp(0, top).to(torch.uint8).reshape(rows, columns),
        scales=scales,
        zeros=None if spec.symmetric else zeros.to(torch.uint8),
    )


def integers(bits, strategy, zero, dtype) -> QTensor:
    size = 20 if strategy == "group" else None
    spec = QuantSpec("int", bits, strategy, size, zero=zero, scale_dtype=dtype)
    return rounded(torch.randn(37, 60, generator=torch.Generator().manual_seed(bits)), spec)


@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("zero", ["none", "subtract"])
def test_compressed_tensors_unpacks_and_packs_as_we_do(strategy, zero):
    ct = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    fmt = get_format("compressed-tensors")
    for bits in range(1, 9):
        for dtype in (BF16, F16, torch.float32):
            q = integers(bits, strategy, zero, dtype)
            schemes = ModelSchemes(linears={"a": Scheme(weight=q.spec)})
            config = ct.QuantizationConfig.model_validate(fmt.config(schemes))
            scheme = config.config_groups["group_0"]
            tensors = fmt.encode(q, model_dtype=dtype)
            theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
            assert torch.equal(theirs, q.dequantize(dtype)), (bits, dtype)
        # in float32 (the last) their rounding finds the codes again
        state = {"weight": theirs, "weight_scale": tensors["weight_scale"]}
        state["weight_zero_point"] = _centred_zeros(q)
        again = PackedQuantizationCompressor.compress(state, scheme)
        assert set(again) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(again[name], tensor), (bits, name)


def _centred_zeros(q: QTensor) -> torch.Tensor:
    middle = 2 ** (q.spec.bits - 1)
    if q.zeros is None:
        return torch.zeros(q.scales.shape, dtype=torch.int8)
    zeros = (q.zeros.int() - middle).to(torch.int8)
    return zeros.reshape(1) if q.spec.strategy == "tensor" else zeros


def test_compressed_tensors_converts_our_awq_file():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    fmt = get_format("autoawq")
    spec = QuantSpec("int", 4, "group", 32, zero="subtract", scale_dtype=F16)
    for zero in ("none", "subtract"):
        q = rounded(torch.randn(64, 96), replace(spec, zero=zero))
        linears = {"model.a": Scheme(weight=q.spec), "lm_head": Scheme()}
        converter = AutoAWQConverter.from_autoawq_config(fmt.config(ModelSchemes(linears=linears)))
        ours = fmt.encode(q, model_dtype=F16)
        theirs = converter.process({f"model.a.{name}": t for name, t in ours.items()})
        local = {name.removeprefix("model.a."): t for name, t in theirs.items()}
        expected = replace(q, spec=spec, zeros=_all_zeros(q))
        encoded = get_format("compressed-tensors").encode(expected, model_dtype=F16)
        assert set(local) == set(encoded)
        for name, tensor in encoded.items():
            assert torch.equal(local[name], tensor), name
        unpacked = unpack_from_int32(local["weight_packed"], 4, torch.Size(q.shape))
        assert torch.equal(unpacked.int() + 8, q.codes.int())


def _all_zeros(q: QTensor) -> torch.Tensor:
    return torch.full(q.scales.shape, 8, dtype=torch.uint8) if q.zeros is None else q.zeros


def tiny_llama(dtype: torch.dtype):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def write_checkpoint(folder: Path, fmt: Format, spec: QuantSpec, dtype: torch.dtype):
    """Write a tiny Llama in `fmt`; returns the float model that holds its dequantized weights."""
    model = tiny_llama(dtype)
    tensors = dict(model.state_dict())
    schemes = {}
    for module, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        schemes[module] = Scheme() if module == "lm_head" else Scheme(weight=spec)
        if module == "lm_head":
            continue
        q = rounded(linear.weight.detach(), spec)
        del tensors[f"{module}.weight"]
        for name, tensor in fmt.encode(q, model_dtype=dtype).items():
            tensors[f"{module}.{name}"] = tensor
        linear.weight.data = q.dequantize(dtype)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads(model.config.to_json_string())
    entry = fmt.config(ModelSchemes(linears=schemes))
    if entry:
        config["quantization_config"] = entry
    (folder / "config.json").write_text(json.dumps(config))
    return model


def logits(model) -> torch.Tensor:
    ids = torch.arange(48).reshape(2, 24)
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize(
    ("bits", "strategy", "zero", "dequantize"),
    [
        (4, "group", "none", False),
        (4, "group", "none", True),
        (4, "group", "subtract", True),
        (8, "channel", "none", False),
        (8, "channel", "subtract", True),
        (3, "group", "subtract", True),
    ],
)
def test_transformers_loads_compressed_tensors(tmp_path, bits, strategy, zero, dequantize):
    """Packed asymmetric weights load only with dequantize=True in transformers 5.23."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    size = 32 if strategy == "group" else None
    spec = QuantSpec("int", bits, strategy, size, zero=zero, scale_dtype=BF16)
    expected = write_checkpoint(tmp_path, get_format("compressed-tensors"), spec, BF16)
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16, **extra)
    assert torch.equal(logits(loaded), logits(expected))
    assert not torch.equal(logits(loaded), logits(tiny_llama(BF16)))


def test_transformers_loads_dense(tmp_path):
    from transformers import AutoModelForCausalLM

    spec = QuantSpec("int", 4, "group", 32, zero="subtract")
    expected = write_checkpoint(tmp_path, get_format("dense"), spec, BF16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "zero"),
    [("autoawq", "none"), ("autoawq", "subtract"), ("gptq", "none"), ("gptq-v2", "none")],
)
def test_gptqmodel_loads_awq_and_gptq(tmp_path, name, zero):
    """Slow: gptqmodel compiles a CPU kernel when it is first used, for up to two minutes."""
    why = "wants torch of its own (7.7 asks for 2.14.1 or newer): an environment beside this one"
    pytest.importorskip("gptqmodel", reason=f"gptqmodel is not installed; it {why}")
    pytest.importorskip("optimum", reason="optimum, which loads GPTQ files, is not installed")
    from transformers import AutoModelForCausalLM

    spec = QuantSpec("int", 4, "group", 32, zero=zero, scale_dtype=F16)
    expected = write_checkpoint(tmp_path, get_format(name), spec, F16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F16, device_map="cpu")
    classes = {type(module).__name__ for module in loaded.modules()}
    assert not any(type(m) is torch.nn.Linear for n, m in loaded.named_modules() if "q_proj" in n)
    difference = (logits(loaded) - logits(expected)).abs().max()
    off = (logits(tiny_llama(F16)) - logits(expected)).abs().max()
    assert difference < 2e-3 < off / 3, (classes, float(difference), float(off))
