"""Weights as others publish them: what is read is what their own tools make of the files."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.checkpoint.consolidated import halves_from_pairs
from compressor.checkpoint.find import locate
from compressor.errors import InputError, Problems
from compressor.formats.base import get_format
from compressor.ir.scheme import KVSpec
from compressor.numerics.activations import fake_quantize_kv, static_kv_scale
from tests.support.golden_files import GOLDEN, vectors, vectors_and_notes


@pytest.mark.parametrize("name", ["q", "k"])
def test_rows_of_mistral_s_own_files(name: str) -> None:
    golden, notes = vectors_and_notes("formats/mistral_permute")
    heads = int(notes["n_heads" if name == "q" else "n_kv_heads"])
    turned = halves_from_pairs(golden[f"w{name}"].float(), heads)
    assert torch.equal(turned.to(torch.bfloat16), golden[f"hf.{name}_proj"])
    assert torch.equal(golden[f"w{name}"][golden[f"row_index.{name}_proj"]], turned.bfloat16())


@pytest.mark.parametrize(
    ("file", "prefix", "bits", "group"),
    [
        ("ct_int4_g32", "", 4, 32),
        ("w4afp8", "ct_pack.", 4, 128),
        ("w4afp8", "ct_int.", 4, 128),
    ],
)
def test_packed_integers(file: str, prefix: str, bits: int, group: int) -> None:
    golden, notes = vectors_and_notes(f"formats/{file}")
    keys = ast.literal_eval(notes[f"{prefix[:-1]}_keys" if prefix else "keys"])
    tensors = {key: golden[prefix + key] for key in keys}
    fmt = get_format("compressed-tensors")
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    group_entry = {
        "targets": ["Linear"],
        "weights": {**weights, "group_size": group},
        "input_activations": {**inputs, "strategy": "token"} if file == "w4afp8" else None,
    }
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group_entry}}
    scheme = fmt.schemes(config, {"x": tensors}).linears["x"]
    shape = tuple(golden["dequant"].shape)
    stored = fmt.stored(tensors, scheme, shape, model_dtype=torch.bfloat16)
    assert stored.keys() == set(keys)  # none is left over
    q = fmt.decode(tensors, scheme.weight)
    assert torch.equal(q.dequantize(torch.bfloat16), golden["dequant"])


def test_fp8_blocks_at_a_ragged_end() -> None:
    golden = vectors("formats/ct_fp8_block_ragged")
    fmt = get_format("compressed-tensors")
    tensors = {
        "weight": golden["weight_u8"].view(torch.float8_e4m3fn),
        "weight_scale": golden["weight_scale"],
    }
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block"}
    entry = {"targets": ["Linear"], "weights": {**weights, "block_structure": [128, 128]}}
    entry["format"] = "naive-quantized"
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": entry}}
    scheme = fmt.schemes(config, {"x": tensors}).linears["x"]
    found = fmt.decode(tensors, scheme.weight).dequantize(torch.bfloat16)
    assert torch.equal(found, golden["dequant"].to(torch.bfloat16))


INT = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
MX = {"type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
MX |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm}


PACKED = {"weight_packed": "weight_packed", "weight_scale": "weight_scale"}
INTEGERS = {**PACKED, "weight_shape": "weight_shape"}
CODES = {"weight": "weight_u8", "weight_scale": "weight_scale"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
SOURCES: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "ct_int4_g32": (compressed(**INT), INTEGERS, "dequant"),
    "ct_wna8_w4_sym": (compressed(**{**INT, "group_size": 64}), INTEGERS, "dequant"),
    "ct_wna8_w8_asym": (
        compressed(**{**INT, "group_size": 64, "num_bits": 8, "symmetric": False}),
        {**INTEGERS, "weight_zero_point": "weight_zero_point"},
        "dequant",
    ),
    "ct_mxfp4_bf16": (compressed(num_bits=4, **MX), PACKED, "dequant"),
    "ct_mxfp8_bf16": (compressed(num_bits=8, **MX), CODES, "dequant"),
    "modelopt_mxfp4_bf16": (
        modelopt("mxfp4"),
        {"weight": "weight", "weight_scale": "weight_scale"},
        "dequant",
    ),
    "modelopt_mxfp8_bf16": (modelopt("MXFP8"), CODES, "dequant"),
    "mxfp4_to_nvfp4_inrange": (
        {**modelopt("W4A16_NVFP4"), "group_size": 16, "ignore": []},
        {"weight": "weight", "weight_scale": "weight_scale_u8", "weight_scale_2": "weight_scale_2"},
        "nv_dequant_fp32",
    ),
    "fp8_block_tf_float": (
        {**FP8, "weight_block_size": [128, 128]},
        {"weight": "weight_u8", "weight_scale_inv": "weight_scale_inv"},
        "dequant_bf16",
    ),
    "fp8_block_tf_ue8m0": (
        {**FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        {"weight": "weight_u8", "weight_scale_inv": "weight_scale_inv_u8"},
        "dequant_bf16",
    ),
    "fp8_per_tensor": (FP8, CODES, "dequant_fp32"),
    "fp8_fp4_experts": (
        {**FP8, "weight_block_size": [128, 128]},
        {"weight": "weight_i8", "scale": "scale_u8"},
        "dequant_bf16",
    ),
    "w4afp8": (
        {"quant_method": "w4afp8"},
        {"weight": "sglang.weight_i8", "weight_scale_inv": "ct_pack.weight_scale"},
        "dequant",
    ),
}
"""Published vectors → how such a checkpoint declares itself, tensors on disk, what they mean."""


def as_checkpoint(folder: Path, tensors: dict[str, Tensor], declared: dict[str, Any]) -> Path:
    folder.mkdir()
    config = {"model_type": "any", "dtype": "float32", "quantization_config": declared}
    (folder / "config.json").write_text(json.dumps(config))
    whole = {f"layers.0.x.{name}": t.contiguous() for name, t in tensors.items()}
    save_file({**whole, "norm.weight": torch.ones(8)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("file", SOURCES)
def test_a_checkpoint_is_read_to_its_last_tensor(file: str, tmp_path: Path) -> None:
    """And one that has a tensor more is refused by its name."""
    golden, (declared, names, meaning) = vectors(f"formats/{file}"), SOURCES[file]
    tensors = {disk: golden[name] for disk, name in names.items()}
    for disk, name in names.items():
        if (name.endswith("_u8") or name == "weight_u8") and (disk == "weight" or "nvfp4" in file):
            tensors[disk] = tensors[disk].view(torch.float8_e4m3fn)
    folder = as_checkpoint(tmp_path / "m", tensors, declared)
    source = locate(str(folder), fetch=False, chosen="none").source
    (unit,) = (unit for unit in source.layout.units if unit.linears)
    assert not [name for name in unit.others if name != "norm.weight"]
    found = source.read_unit(unit).dequantized()["layers.0.x.weight"]
    assert torch.equal(found.to(golden[meaning].dtype), golden[meaning])
    more = {**tensors, "weight_rotation": torch.ones(4)}
    with pytest.raises((InputError, Problems), match=r"layers\.0\.x\.weight_rotation"):
        locate(str(as_checkpoint(tmp_path / "more", more, declared)), fetch=False, chosen="none")


def test_every_published_vector_of_a_format_is_read() -> None:
    """By one of the tests, so that a new file cannot lie there unseen."""
    folder = GOLDEN / "formats"
    text = "".join(path.read_text("utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    stems = [path.stem for path in folder.glob("*.safetensors")]
    families = ("ct_mxfp4_", "ct_mxfp8_", "modelopt_mxfp4_", "modelopt_mxfp8_", "ct_wna8_w")
    unseen = [s for s in stems if s not in text and not s.startswith(families)]
    assert not [stem for stem in unseen if not stem.startswith("mxfp4_to_nvfp4_")]


def test_scales_of_a_cache_by_head() -> None:
    golden = vectors("formats/ct_kv_attn_head")
    spec, keys = KVSpec("fp8_e4m3", "head"), golden["k"]
    absmax = keys.abs().amax((0, 2))
    scale = static_kv_scale(absmax, spec)
    assert torch.equal(scale, golden["k_scale"].reshape(-1))
    codes = golden["codes_u8"].view(torch.float8_e4m3fn).float()
    assert torch.equal(fake_quantize_kv(keys, spec, scale), codes * golden["k_scale"])
    fmt = get_format("compressed-tensors")
    stored = fmt.kv_tensors(spec, "a", k_scale=scale, v_scale=scale, model_dtype=torch.float32)
    assert torch.equal(stored["a.k_scale"], golden["k_scale"])
    read = fmt.kv_scales(stored, "a")
    assert read is not None and torch.equal(read[0], scale)
