"""Weights as others publish them: what is read is what their own tools make of the files."""

from __future__ import annotations

import ast

import pytest
import torch

from compressor.checkpoint.consolidated import Halves
from compressor.formats.base import get_format
from tests.support.golden_files import vectors, vectors_and_notes


@pytest.mark.parametrize("name", ["q", "k"])
def test_rows_of_mistral_s_own_files(name: str) -> None:
    golden, notes = vectors_and_notes("formats/mistral_permute")
    heads = int(notes["n_heads" if name == "q" else "n_kv_heads"])
    turned = Halves(heads, int(notes["head_dim"]))({"weight": golden[f"w{name}"]})
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
