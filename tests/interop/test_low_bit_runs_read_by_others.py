"""Whole runs of the low-bit passes, read by transformers with compressed-tensors: its logits are
those of our own evaluation of the same files, quantized inputs included."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.find import locate
from compressor.checkpoint.source import open_source
from compressor.ir.scheme import ActivationSpec
from compressor.numerics.nvfp4 import fake_quantize_nvfp4, full_range
from compressor.run.convert import convert
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.sweep import StreamedModel, run_blocks
from tests.support.recipes import short_recipe

pytestmark = pytest.mark.interop

CPU = choose_device("cpu")
IDS = torch.arange(4, 100).reshape(2, 48)
WIDE = {"hidden_size": 128, "intermediate_size": 256}
W8A8 = {"bits": 8, "group_size": None, "activations": "token"}
CASES: dict[str, list[Any]] = {
    "smoothquant": [{"smoothquant": {"bits": 8}}],
    "smoothquant-o1": [{"smoothquant": {"bits": 8, "weights": "tensor"}}],
    "smoothquant-o2": [{"smoothquant": {"bits": 8, "weights": "tensor", "activations": "tensor"}}],
    "smoothquant-o3": [{"smoothquant": {"bits": 8, "weights": "tensor", "activations": "static"}}],
    "smoothquant-rtn": [{"smoothquant": {"alpha": "search", "fold_up": True}}, {"rtn": W8A8}],
    "w8a8-asymmetric": [{"rtn": {**W8A8, "symmetric": False}}],
    "w4a8-groups": [{"rtn": {"bits": 4, "group_size": 32, "activations": "token"}}],
    "w4afp8": [{"rtn": {"bits": 4, "activations": "fp8"}}],
    "w8": [{"rtn": {"bits": 8, "group_size": 32}}],
    "w3": [{"rtn": {"bits": 3, "group_size": 32}}],
    "fp8-dynamic": ["fp8"],
    "fp8-static": [{"fp8": {"scales": "static"}}],
    "fp8-block": [{"fp8": {"scales": "block"}}],
    "fp8-weights": [{"fp8": {"scales": "weights"}}],
    "nvfp4": [{"nvfp4": {"rule": "static_6"}}],
    "nvfp4-four-over-six": ["nvfp4"],
    "nvfp4-square": [{"nvfp4": {"block": "16x16"}}],
    "nvfp4-w4a4": [{"nvfp4": {"activations": "calibrated"}}],
    "nvfp4-w4a4-dynamic": [{"nvfp4": {"activations": "dynamic"}}],
    "awq-nvfp4": [{"awq": {"search": "inputs"}}, {"nvfp4": {"activations": "calibrated"}}],
    "mxfp4": ["mxfp4"],
    "mxfp4-w4a4": [{"mxfp4": {"rule": "nearest", "activations": "dynamic"}}],
    "mxfp8": [{"mxfp8": {"rule": "ceil"}}],
    "mxfp8-w8a8": [{"mxfp8": {"activations": "dynamic"}}],
    "nvfp4-fp8": [{"fp8": {"targets": ["attn.*"]}}, {"nvfp4": {"targets": ["mlp.*"]}}],
    "mixed": [
        {"fp8": {"targets": ["mlp.down"]}},
        {"nvfp4": {"targets": ["mlp.gate", "mlp.up"]}},
        {"rtn": {"bits": 4, "group_size": 32, "targets": ["attn.*"]}},
    ],
}


def run(model: Path, output: Path, passes: list[Any], **top: Any) -> Path:
    recipe = short_recipe(model, output, passes, **top)
    return compile_checkpoint(prepare(recipe, device=CPU)).output


def our_logits(folder: Path) -> torch.Tensor:
    model = StreamedModel(open_source(folder))
    (stream,) = run_blocks([model], IDS, device=CPU, dtype=torch.float32)
    with stream.logits() as logits:
        return torch.stack([logits(hidden) for hidden in stream.hidden])


def as_they_do(x: torch.Tensor, spec: ActivationSpec, scale: object) -> torch.Tensor:
    """Dynamic int8 as compressed-tensors simulates it: 127.5 steps to the absmax, where kernels
    have 127, and one scale per tensor over all rows; dynamic NVFP4 has no global scale there."""
    if spec.element == "fp4_e2m1":
        amax = torch.tensor(full_range("static_6"))
        return fake_quantize_nvfp4(x.flatten(0, -2), amax=amax).view(x.shape)
    shared = x.abs().amax(-1 if spec.mode == "token" else (-3, -2, -1), keepdim=True) / 127.5
    return (x / shared).round().clamp(-128, 127) * shared


def their_logits(folder: Path, *, bfloat16: bool, dequantize: bool = False) -> torch.Tensor:
    """In float32, of dense weights if `dequantize`. With `bfloat16`, which their NVFP4, MXFP4 and
    MXFP8 weights always become, those are held against ours and replaced by them: FP4 inputs turn a
    difference of an ulp into one of a code."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
    with torch.no_grad():
        if bfloat16:
            model(input_ids=IDS)  # which decompresses the weights
            torch.nn.Module.float(model)  # transformers' own refuses quantized models
            source = open_source(folder)
            for unit in source.layout.units:
                for name, ours in source.read_unit(unit).dequantized().items():
                    theirs = model.get_parameter(name)
                    torch.testing.assert_close(theirs.data, ours.float(), rtol=2**-6, atol=1e-7)
                    theirs.data = ours.float()
        return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def source(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    return tiny_models.build("llama", folder, **WIDE)


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    output = run(source, tmp_path / "out", CASES[name])
    original, ours = our_logits(source), our_logits(output)
    error = float((ours - original).square().mean().sqrt())
    assert 0 < error < 0.6 * float(original.std())
    schemes = open_source(output).schemes.linears.values()
    dynamic = [s.input for s in schemes if s.input and s.input.mode in ("token", "tensor")]
    if any(input.element in ("int8", "fp4_e2m1") for input in dynamic):
        monkeypatch.setattr("compressor.runner.simulate.fake_quantize_activation", as_they_do)
        ours = our_logits(output)
    weights = [s.weight for s in schemes if s.weight is not None]
    # Packed zero points load as dense weights only, whose inputs they leave in float.
    dequantize = any(w.element == "int" and not w.symmetric for w in weights)
    if dequantize:
        monkeypatch.setattr("compressor.runner.simulate.fake_quantize_activation", lambda x, *_: x)
        ours = our_logits(output)
    bfloat16 = any(w.element == "fp4_e2m1" or w.microscaled for w in weights)
    theirs = their_logits(output, bfloat16=bfloat16, dequantize=dequantize)
    difference = float((theirs - ours).square().mean().sqrt())
    # Rounding is discontinuous: where an input is an ulp off, a code may be the neighbouring one.
    exact = not bfloat16 and (dequantize or all(s.input is None for s in schemes))
    assert difference < (1e-4 if exact else 0.05 * error)


@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("element", ["fp8", "int8"])
def test_a_quantized_cache(
    element: str,
    scales: str,
    source: Path,
    tmp_path: Path,
    attention_they_know: None,
) -> None:
    """Scales are where they look for them, and logits with keys and values rounded are ours."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    passes = [{"fp8": {"scales": "weights"}}, {"kv_cache": {"element": element, "scales": scales}}]
    output = run(source, tmp_path / "out", passes)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ours = open_source(output)
    for unit in ours.layout.units[1:-1]:
        attention = loaded.get_submodule(f"{unit.name}.self_attn")
        extra = ours.read_unit(unit).extra
        for name in ("k_scale", "v_scale"):
            stored = extra[f"{unit.name}.self_attn.{name}"].flatten()
            assert stored.numel() == (1 if scales == "tensor" else 2)
            assert bool((stored > 1e-4).all())
            assert getattr(attention, name).flatten().tolist() == pytest.approx(stored.tolist())
    without = run(source, tmp_path / "without", passes[:1])
    plain, rounded = our_logits(without), our_logits(output)
    error = float((rounded - plain).square().mean().sqrt())
    assert 0 < error < float(plain.std())
    with torch.no_grad():
        theirs = loaded(input_ids=IDS, use_cache=False).logits
    assert float((theirs - rounded).square().mean().sqrt()) < 0.05 * error


@pytest.mark.parametrize(
    "passes, fmt",
    [
        ([{"fp8": {"scales": "static"}}], "modelopt-fp8"),
        ([{"nvfp4": {"activations": "calibrated"}}], "modelopt-nvfp4"),
        (["nvfp4"], "modelopt-nvfp4"),
    ],
)
def test_modelopt_files_of_a_run_mean_the_same_as_compressed_tensors(
    passes: list[Any], fmt: str, source: Path, tmp_path: Path
) -> None:
    """transformers reads neither of ModelOpt's formats, so it reads what they convert to."""
    pytest.importorskip("compressed_tensors")
    output = run(source, tmp_path / "out", passes, format=fmt)
    convert(locate(str(output), fetch=True), tmp_path / "ct", format="compressed-tensors")
    original, ours = our_logits(source), our_logits(output)
    error = float((ours - original).square().mean().sqrt())
    assert 0 < error < 0.6 * float(original.std())
    theirs = their_logits(tmp_path / "ct", bfloat16="nvfp4" in fmt)
    difference = float((theirs - ours).square().mean().sqrt())
    assert difference < 0.05 * error


def test_fp8_blocks_are_one_checkpoint_in_two_formats(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `quant_method: fp8` transformers makes floats on a CPU; converted, the codes are those of
    compressed-tensors."""
    from transformers import AutoModelForCausalLM

    passes = [{"fp8": {"scales": "block"}}]
    output = run(source, tmp_path / "out", passes, format="fp8")
    loaded, found = AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    written = open_source(output)
    assert written.low_precision == "fp8"
    for unit in written.layout.units:
        for name, ours in written.read_unit(unit).dequantized(torch.float32).items():
            assert torch.equal(loaded.get_parameter(name), ours), name
    monkeypatch.setattr("compressor.runner.simulate.fake_quantize_activation", lambda x, *_: x)
    with torch.no_grad():
        theirs = loaded(input_ids=IDS).logits
    torch.testing.assert_close(theirs, our_logits(output), rtol=1e-4, atol=1e-4)
    convert(
        locate(str(output), fetch=True),
        tmp_path / "ct",
        format="compressed-tensors",
        allow_rounding=True,
    )
    moved = open_source(tmp_path / "ct")
    for old, new in zip(written.layout.units, moved.layout.units, strict=True):
        before, after = written.read_unit(old).quantized, moved.read_unit(new).quantized
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].codes, after[name].codes) for name in before)
