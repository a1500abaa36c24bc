"""XAttention's estimate, choice of blocks and calibration against the released code's vectors."""

import json

import pytest
import torch
from compressor_kernels.attention.antidiagonal import antidiagonal_sums_ref, covering_blocks_ref
from compressor_kernels.attention.tile_attention import density, tile_attention_ref

from compressor.numerics.attention_thresholds import block_mass, mass_threshold
from tests.support.golden_files import vectors, vectors_and_notes

CASES = [
    "single_chunk_exact",
    "single_chunk_padded",
    "multi_chunk_padded",
    "perhead_threshold",
    "stride4_keep_recent",
]


@pytest.mark.parametrize("name", CASES)
def test_chosen_blocks(name: str) -> None:
    golden, notes = vectors_and_notes(f"attention/xattn_{name}")
    block, stride, chunk = (int(notes[key]) for key in ("block_size", "stride", "chunk_size"))
    q, k, blocks = golden["q"], golden["k"], int(notes["valid_blocks"])
    sums = antidiagonal_sums_ref(q, k, block_size=block, stride=stride)
    want = golden["attn_sums"][..., :blocks, :blocks]
    torch.testing.assert_close(sums, want, atol=1e-5, rtol=1e-4)
    threshold = torch.tensor(json.loads(notes["threshold"])).expand(q.shape[1])
    chosen = covering_blocks_ref(sums, threshold, reference_rows=chunk // block)
    assert torch.equal(chosen, golden["mask_valid"].bool())
    assert float(density(chosen).mean()) == pytest.approx(float(notes["density_lower_tri"]))


def test_a_profiled_threshold() -> None:
    golden = vectors("attention/xattn_profile_threshold")
    mass = block_mass(golden["q"], golden["k"], block_size=32)
    torch.testing.assert_close(mass, golden["true_block_sums"], atol=1e-4, rtol=1e-4)
    sums = antidiagonal_sums_ref(golden["q"], golden["k"], block_size=32, stride=8)
    found = mass_threshold(mass, sums, coverage=0.9)
    torch.testing.assert_close(found, golden["threshold_head"], atol=1e-5, rtol=1e-4)


def test_calibrated_and_used() -> None:
    golden = vectors("systems/xattn_calibrate_and_apply")
    tau = torch.empty(2, 2, 2)
    for text in range(2):
        for layer in range(2):
            q, k = (golden[f"text{text}.layer{layer}.{x}"].float() for x in "qk")
            mass = block_mass(q, k, block_size=32)
            sums = antidiagonal_sums_ref(q, k, block_size=32, stride=8)
            tau[text, layer] = mass_threshold(mass, sums, coverage=0.9)[0]
    torch.testing.assert_close(tau, golden["tau_per_text"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tau.amax(0), golden["tau"], atol=1e-5, rtol=1e-4)
    q, k, v = (golden[f"text0.layer0.{x}"].float() for x in "qkv")
    sums = antidiagonal_sums_ref(q, k, block_size=32, stride=8)
    torch.testing.assert_close(sums * 8, golden["xattn_block_sums"], atol=1e-4, rtol=1e-4)
    for rule, rows in (("clean", 0), ("compat", 8)):
        chosen = covering_blocks_ref(sums, golden["tau"][0], reference_rows=rows)
        assert torch.equal(chosen, golden[f"{rule}.mask"].bool())
        assert float(density(chosen).mean()) == pytest.approx(float(golden[f"{rule}.density"]))
        mass = block_mass(q, k, block_size=32)
        covered = (mass * chosen).sum((2, 3)) / mass.sum((2, 3))
        torch.testing.assert_close(covered, golden[f"{rule}.coverage_per_head"])
        out = tile_attention_ref(q, k, v, chosen, block_size=32)
        torch.testing.assert_close(out, golden[f"{rule}.out"], atol=1e-4, rtol=1e-4)
