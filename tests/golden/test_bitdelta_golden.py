"""Sign packing and the one-bit product against vectors of an independent implementation."""

import pytest
import torch
from compressor_kernels.linear.bitdelta import (
    delta_matmul_ref,
    pack_bits,
    pack_signs,
    unpack_bits,
    unpack_signs,
)

from tests.support.golden_files import vectors


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_pack_bits(width):
    golden = vectors("quant/bitdelta_pack")
    bits, packed = golden["bool_in"].bool(), golden[f"packed{width}"]
    assert torch.equal(pack_bits(bits, width=width), packed)
    assert torch.equal(unpack_bits(packed, rows=bits.shape[-2]), bits)


@pytest.mark.parametrize("tag", ["fp32", "bf16", "fp16"])
def test_masks_and_merged_weights(tag):
    golden = vectors("quant/bitdelta_binarydiff")
    base, fine = golden[f"{tag}.base"], golden[f"{tag}.finetune"]
    signs = pack_signs(fine - base)
    assert torch.equal(signs, golden[f"{tag}.mask_packed_i32"])
    dense = unpack_signs(signs, in_features=base.shape[1])
    assert torch.equal((dense.T + 1) // 2, golden[f"{tag}.sign_unpacked_u8"].to(torch.int8))
    delta = dense.float() * golden[f"{tag}.coeff"]
    assert torch.equal(delta, golden[f"{tag}.delta_dequant_out_in_fp32"])
    assert torch.equal(base + delta.to(base.dtype), golden[f"{tag}.merged_weight"])


@pytest.mark.parametrize("tag", ["fp32", "bf16", "fp16"])
def test_forward(tag):
    golden = vectors("quant/bitdelta_binarydiff")
    x, base = golden[f"{tag}.x"].float(), golden[f"{tag}.base"].float()
    signs = golden[f"{tag}.mask_packed_i32"].expand(len(x), -1, -1)
    alpha = golden[f"{tag}.coeff"].expand(len(x))
    y = delta_matmul_ref(x, signs, alpha, base_out=x @ base.T)
    torch.testing.assert_close(y, golden[f"{tag}.forward_fp32_math"], rtol=1e-4, atol=1e-4)


def test_each_further_bit_packs_the_sign_of_what_is_left():
    golden = vectors("quant/bitdelta_multibit")
    fine, at = golden["finetune"], golden["base"]
    for k in range(4):
        signs = pack_signs(fine - at)
        assert torch.equal(signs, golden[f"iter{k}.mask"])
        at = at + unpack_signs(signs, in_features=at.shape[1]) * golden[f"iter{k}.coeff"]
    torch.testing.assert_close(at, golden["final"])
