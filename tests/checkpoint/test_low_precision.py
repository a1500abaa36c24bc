"""Weights of low precision read as floats: golden vectors, formulas, transformers' own reading."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.low_precision import fp8
from compressor.checkpoint.low_precision.base import DecodedCheckpoint
from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Problems
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from tests.support.golden_files import vectors
from tests.support.readings import logits, read
from tests.support.tiny_models import TYPES

E4M3 = torch.float8_e4m3fn
BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


@pytest.fixture
def copy(tiny_model, tmp_path):
    def make(model_type: str = "llama", **options: Any) -> Path:
        return Path(shutil.copytree(tiny_model(model_type, **options), tmp_path / "model"))

    return make


def rewrite(folder: Path, change, declared: dict[str, Any] | None = None) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {} if declared is None else {"quantization_config": declared}
    (folder / "config.json").write_text(json.dumps(config))


def dense(folder: Path, tmp_path: Path) -> Path:
    """Our reading as a plain checkpoint."""
    out = tmp_path / "dense"
    shutil.copytree(folder, out)
    save_file(read(folder), out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    return out


def in_blocks(tensors, size=32, suffix="_scale_inv", only="proj", dtype=torch.float32):
    """Linears of the blocks in FP8 with a scale for each block, the last ones short."""
    out = {}
    for name, value in tensors.items():
        if value.dim() != 2 or "layers" not in name or ("gate.weight" in name):
            out[name] = value
            continue
        rows, columns = value.shape
        scale = torch.zeros(-(-rows // size), -(-columns // size))
        codes = torch.empty(value.shape, dtype=E4M3)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
                scale[i, j] = value[at].float().abs().max() / 448
                codes[at] = (value[at].float() / scale[i, j]).to(E4M3)
        out[name], out[name + suffix] = codes, scale.to(dtype)
    return out


def by_hand(codes: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """Element by element: the value of its code times the scale of its block."""
    rows = torch.arange(codes.shape[0]) // size
    columns = torch.arange(codes.shape[1]) // size
    return codes.float() * scale.float()[rows][:, columns]


@pytest.mark.parametrize("model_type", TYPES)
def test_block_fp8_of_every_family_is_what_transformers_reads(copy, tmp_path, model_type):
    folder = copy(model_type)
    rewrite(folder, in_blocks, BLOCK)
    stored = load_file(folder / "model.safetensors")
    source = open_source(folder)
    assert source.low_precision == "fp8 in blocks of 32 x 32"
    found, scales = read(folder), [name for name in stored if name.endswith("_scale_inv")]
    assert len(scales) >= 8 and not any(name in found for name in scales)
    for name in scales:
        weight = name.removesuffix("_scale_inv")
        assert torch.equal(found[weight], by_hand(stored[weight], stored[name], 32)), weight
    theirs, ours = logits(folder), logits(dense(folder, tmp_path))
    assert float((theirs - ours).norm() / theirs.norm()) < 1e-5


def test_the_golden_vectors(tmp_path):
    ragged = vectors("formats/fp8_block_ragged")
    keys = {"weight": next(k for k in ragged if k.startswith("weight_u8") or k == "weight_u8")}
    parts = {"weight": ragged[keys["weight"]].view(E4M3)}
    scale = next(v for k, v in ragged.items() if "scale" in k)
    value = fp8._scaled({**parts, "scale": scale}, size=(128, 128))
    assert torch.equal(value, ragged["ct_dequant_fp32"])
    assert torch.equal(value.bfloat16(), ragged["ct_dequant_bf16"])
    for name in ("fp8_block_tf_float", "fp8_block_tf_ue8m0"):
        golden = vectors(f"formats/{name}")
        scale = golden.get("weight_scale_inv", golden.get("weight_scale_inv_u8"))
        size = (-(-golden["weight_u8"].shape[0] // scale.shape[0]),) * 2
        parts = {"weight": golden["weight_u8"].view(E4M3), "scale": scale}
        assert torch.equal(fp8._scaled(parts, size=size).bfloat16(), golden["dequant_bf16"]), name
    golden = vectors("formats/fp8_per_tensor")
    parts = {"weight": golden["weight_u8"].view(E4M3), "scale": golden["weight_scale"]}
    assert torch.equal(fp8._scaled(parts, size=golden["weight_u8"].shape), golden["dequant_fp32"])


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("form", ["one", "scalar", "outputs", "column", "exponents", "bytes"])
def test_every_form_of_scale(copy, form, declared):
    folder = copy()
    before = load_file(folder / "model.safetensors")
    scales = {
        "one": torch.tensor([0.25]),
        "scalar": torch.tensor(0.25),
        "outputs": torch.linspace(0.1, 1, 96),
        "column": torch.linspace(0.1, 1, 96).bfloat16()[:, None],
        "exponents": torch.full((1, 1), 0.25).to(torch.float8_e8m0fnu),
        "bytes": torch.full((1, 1), 125, dtype=torch.uint8),
    }
    name, scale = "model.layers.1.mlp.up_proj.weight", scales[form]
    codes = before[name].to(E4M3)
    rewrite(
        folder,
        lambda t: t | {name: codes, name + "_scale": scale},
        {"quant_method": "fp8", "weight_block_size": None} if declared else None,
    )
    value = scale.view(torch.float8_e8m0fnu).float() if form == "bytes" else scale.float()
    expected = codes.float() * (value[:, None] if form == "outputs" else value)
    assert torch.equal(read(folder)[name], expected)


def test_raw_fp8_is_the_weights_and_needs_no_consent(copy, tmp_path):
    folder = copy()
    rewrite(folder, lambda t: {k: v.to(E4M3) if v.dim() == 2 else v for k, v in t.items()})
    stored, found = load_file(folder / "model.safetensors"), read(folder)
    assert all(torch.equal(found[name], stored[name].float()) for name in stored)
    assert torch.equal(logits(dense(folder, tmp_path)), logits(folder))
    source = open_source(folder)
    assert not source.low_precision and "stored as float8" in source.checkpoint.notes[0]
    recipe = {"model": "m", "output": "o", "passes": [{"rtn": {"bits": 8, "group_size": 32}}]}
    assert make_plan(make_recipe(recipe), source).notes[0] == source.checkpoint.notes[0]


def test_low_precision_needs_consent(copy):
    folder = copy(dtype=torch.bfloat16)
    rewrite(folder, in_blocks, BLOCK)
    recipe = {"model": "m", "output": "o", "passes": [{"rtn": {"bits": 8, "group_size": 32}}]}
    source = open_source(folder)
    with pytest.raises(Problems, match=r"already quantized \(fp8 in blocks") as error:
        make_plan(make_recipe(recipe), source)
    assert "dequantize_source: true" in (error.value.problems[0].hint or "")
    plan = make_plan(make_recipe({**recipe, "dequantize_source": True}), source)
    assert "quantization_config" not in {k for k, v in plan.target.config().items() if v == BLOCK}
    assert isinstance(source.checkpoint, DecodedCheckpoint)
    size = (folder / "model.safetensors").stat().st_size
    assert 0 < size - source.checkpoint.nbytes < 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {
                k: v for k, v in t.items() if not k.endswith("0.mlp.up_proj.weight_scale_inv")
            },
            "up_proj.weight is float8, but has no scale though",
        ),
        (
            lambda t: t | {"model.layers.0.mlp.up_proj.weight_zero": torch.ones(3)},
            r"up_proj\.weight_zero .* is left over",
        ),
        (
            lambda t: t | {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(5, 5)},
            r"shape \[5, 5\], which for a weight of \[96, 64\] is neither",
        ),
        (
            lambda t: t | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
            "has two scales",
        ),
        (
            lambda t: t | {"model.norm.weight": torch.ones(64, dtype=torch.int8)},
            r"model\.norm\.weight \(int8\) is left over",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(copy, change, message):
    folder = copy()
    rewrite(folder, lambda tensors: change(in_blocks(tensors)), BLOCK)
    with pytest.raises(InputError, match=message):
        open_source(folder)


def test_scales_of_inputs_are_left_out_and_named(copy):
    folder = copy()
    name = "model.layers.0.mlp.up_proj.activation_scale"
    rewrite(folder, lambda t: in_blocks(t) | {name: torch.ones(1)}, BLOCK)
    assert name not in read(folder) and name in open_source(folder).checkpoint.notes[-1]


def gptq(tensors, *, order, size=32, bits=4, shift=1, seed=0):
    """Every linear of the blocks as GPTQ stores it, and what each weight then is, by a loop."""
    rng, out, expected = torch.Generator().manual_seed(seed), {}, {}
    for name, value in tensors.items():
        if value.dim() != 2 or "layers" not in name:
            out[name] = expected[name] = value
            continue
        rows, columns = value.shape
        groups = columns // size
        g_idx = torch.arange(columns) // size
        if order:
            g_idx = g_idx[torch.randperm(columns, generator=rng)]
        codes = torch.randint(2**bits, (rows, columns), generator=rng)
        zeros = torch.randint(1, 2**bits - 1, (groups, rows), generator=rng)
        scales = (torch.rand(groups, rows, generator=rng) * 0.05 + 0.01).half()
        path, per = name.removesuffix(".weight"), 32 // bits
        words = torch.zeros(columns // per, rows, dtype=torch.int64)
        for i in range(columns):
            words[i // per] |= codes[:, i] << (bits * (i % per))
        packed = torch.zeros(groups, rows // per, dtype=torch.int64)
        for o in range(rows):
            packed[:, o // per] |= (zeros[:, o] - shift) << (bits * (o % per))
        out[f"{path}.qweight"], out[f"{path}.qzeros"] = words.int(), packed.int()
        out[f"{path}.scales"], out[f"{path}.g_idx"] = scales, g_idx.int()
        out[f"{path}.bias"] = torch.zeros(rows)
        expected[name] = torch.stack(
            [(codes[:, i] - zeros[g_idx[i]]) * scales[g_idx[i]].float() for i in range(columns)], 1
        )
    return out, expected


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}


@pytest.mark.parametrize("marker", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_in_activation_order_is_the_formula(copy, bits, marker):
    folder = copy()
    shift = 0 if marker == "gptq_v2" else 1
    stored, expected = gptq(
        load_file(folder / "model.safetensors"), order=True, bits=bits, shift=shift
    )
    marked = {} if marker is None else {"checkpoint_format": marker}
    rewrite(folder, lambda t: stored, {**GPTQ, "bits": bits, **marked})
    source, found = open_source(folder), read(folder)
    assert source.low_precision == "gptq in activation order" and not source.quantized
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def packed(tensors, *, bits=4, symmetric=False, size=32, seed=0):
    """Every linear of the blocks as compressed-tensors packs it in activation order, by a loop."""
    rng, out, expected = torch.Generator().manual_seed(seed), {}, {}
    for name, value in tensors.items():
        if value.dim() != 2 or "layers" not in name:
            out[name] = expected[name] = value
            continue
        rows, columns = value.shape
        groups, path, per = columns // size, name.removesuffix(".weight"), 32 // bits
        g_idx = (torch.arange(columns) // size)[torch.randperm(columns, generator=rng)]
        codes = torch.randint(2**bits, (rows, columns), generator=rng)
        zeros = torch.randint(2**bits, (rows, groups), generator=rng)
        zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
        scales = (torch.rand(rows, groups, generator=rng) * 0.05 + 0.01).bfloat16()
        words = torch.zeros(rows, columns // per, dtype=torch.int64)
        for i in range(columns):
            words[:, i // per] |= codes[:, i] << (bits * (i % per))
        stored = torch.zeros(rows // per, groups, dtype=torch.int64)
        for o in range(rows):
            stored[o // per] |= zeros[o] << (bits * (o % per))
        out |= {
            f"{path}.weight_packed": words.int(),
            f"{path}.weight_scale": scales,
            f"{path}.weight_shape": torch.tensor([rows, columns]),
            f"{path}.weight_g_idx": g_idx.int(),
            **({} if symmetric else {f"{path}.weight_zero_point": stored.int()}),
        }
        expected[name] = torch.stack(
            [
                (codes[:, i] - zeros[:, g_idx[i]]) * scales[:, g_idx[i]].float()
                for i in range(columns)
            ],
            1,
        )
    return out, expected


def in_groups(**weights: Any) -> dict[str, Any]:
    """A compressed-tensors config of packed integers."""
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, False)])
def test_packed_weights_in_activation_order_are_the_formula(copy, bits, symmetric):
    folder = copy()
    stored, expected = packed(
        load_file(folder / "model.safetensors"), bits=bits, symmetric=symmetric
    )
    declared = in_groups(num_bits=bits, symmetric=symmetric, actorder="group")
    rewrite(folder, lambda t: stored, declared)
    source, found = open_source(folder), read(folder)
    assert not source.quantized and "in activation order" in source.low_precision
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    name = "model.layers.0.mlp.up_proj.weight_g_idx"
    rewrite(folder, lambda t: t | {name: t[name] + 1})
    with pytest.raises(InputError, match=r"up_proj\.weight: weight_g_idx names groups beyond its"):
        read(folder)


def test_an_order_of_minus_one_says_nothing(copy):
    folder = copy()
    stored, _ = packed(load_file(folder / "model.safetensors"))
    idle = {n: torch.full_like(t, -1) for n, t in stored.items() if n.endswith("g_idx")}
    rewrite(folder, lambda t: stored | idle, in_groups(symmetric=False))
    source = open_source(folder)
    assert source.quantized and source.format.name == "compressed-tensors"
    with_order = source.read_unit(source.layout.units[1]).dequantized()
    rewrite(folder, lambda t: {n: v for n, v in t.items() if n not in idle})
    source = open_source(folder)
    without = source.read_unit(source.layout.units[1]).dequantized()
    assert all(torch.equal(with_order[name], without[name]) for name in without)


def test_gptq_in_order_keeps_its_codes_whatever_desc_act_says(copy):
    folder = copy()
    stored, expected = gptq(load_file(folder / "model.safetensors"), order=False)
    rewrite(folder, lambda t: stored, GPTQ)
    source = open_source(folder)
    assert source.quantized and source.format.name == "gptq"
    found = source.read_unit(source.layout.units[1]).dequantized()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("order", [True, False])
def test_quantize_config_json_declares_what_config_json_does_not(copy, order):
    folder = copy()
    stored, expected = gptq(load_file(folder / "model.safetensors"), order=order)
    rewrite(folder, lambda t: stored)
    with pytest.raises(InputError, match=r"neither config\.json nor quantize_config\.json"):
        open_source(folder)
    entry = {k: v for k, v in GPTQ.items() if k != "quant_method"}
    (folder / "quantize_config.json").write_text(json.dumps({**entry, "desc_act": order}))
    source = open_source(folder)
    assert "as quantize_config.json says" in source.checkpoint.notes[0]
    for unit in source.layout.units:
        for name, value in source.read_unit(unit).dequantized().items():
            assert torch.equal(value, expected[name])
