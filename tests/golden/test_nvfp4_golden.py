"""NVFP4 codes and scales equal to those of the published Four Over Six code.

Theirs does not saturate: where a quotient reaches 7 it writes a code that decodes to zero. Those
elements, and their blocks' choice between 4 and 6, are the only ones that may differ.
"""

import pytest
import torch

from compressor.formats.base import get_format
from compressor.ir.qtensor import NVFP4, QTensor, decode_elements
from compressor.numerics.nvfp4 import (
    e2m1_codes,
    fake_quantize_nvfp4,
    full_range,
    quantize_nvfp4,
    round_e2m1,
    shared_absmax,
)
from tests.support.golden_files import vectors

RULES = ("static_6", "static_4", "mse", "mae", "abs_max")
EXACT = (
    "gauss",
    "gauss_bf16",
    "gauss_fp16",
    "heavy_tail",
    "outlier_cols_bf16",
    "zero_blocks",
    "all_zero",
    "varied_mag",
    "ties_static6",
)


def rules(golden: dict[str, torch.Tensor]) -> list[str]:
    return [rule for rule in RULES if f"{rule}.amax" in golden]


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def unsigned_zero(codes: torch.Tensor) -> torch.Tensor:
    """Codes with −0 as 0: which of them a rounded value gets is not part of its meaning."""
    return torch.where(codes == 8, 0, codes)


def raw(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.uint8)


@pytest.mark.parametrize("name", EXACT)
def test_codes_scales_and_values(name):
    golden = vectors(f"quant/nvfp4_{name}")
    assert rules(golden)
    for rule in rules(golden):
        x = golden["input"]
        q = quantize_nvfp4(x, rule=rule)
        assert torch.equal(shared_absmax([x]).flatten(), golden[f"{rule}.amax"].flatten())
        assert torch.equal(raw(q.scales), golden[f"{rule}.scales_rowmajor_u8"]), rule
        theirs = unpacked(golden[f"{rule}.packed_padded"])[: x.shape[0], : x.shape[1]]
        assert torch.equal(unsigned_zero(q.codes), unsigned_zero(theirs)), rule
        _rounds_to(q.dequantize(), golden[f"{rule}.dequant_bf16"])
        assert torch.equal(fake_quantize_nvfp4(x, rule=rule), q.dequantize(x.dtype))


def _rounds_to(values: torch.Tensor, expected: torch.Tensor) -> None:
    """Theirs multiplies by absmax/range where ours multiplies by the stored global scale. That is
    an ulp or two of float32, so each value is within half a bfloat16 step of theirs, and a little.
    """
    exponent = torch.frexp(expected.float()).exponent
    half_step = torch.where(expected == 0, 0.0, torch.exp2(exponent - 9.0))
    assert bool(((values - expected.float()).abs() <= half_step * (1 + 1e-4)).all())


@pytest.mark.parametrize("name", EXACT)
def test_the_choice_of_four_or_six(name):
    golden = vectors(f"quant/nvfp4_{name}")
    for rule in ("mse", "mae", "abs_max"):
        if f"{rule}.candidate" not in golden:
            continue
        q = quantize_nvfp4(golden["input"], rule=rule)
        blocks = golden["input"].float().view(*q.scales.shape, 16).abs().amax(-1)
        divisor = full_range(rule) / golden[f"{rule}.amax"].reshape(1, 1)
        six = (blocks / 6 * divisor).to(torch.float8_e4m3fn)
        chose_four = raw(q.scales) != raw(six)
        if int((golden[f"{rule}.amax"] == 0).all()):
            continue
        assert torch.equal(chose_four, golden[f"{rule}.candidate"].reshape(six.shape) == 4), rule


def test_saturation_where_the_reference_overflows():
    golden = vectors("quant/nvfp4_tiny_huge")
    for rule in rules(golden):
        x = golden["input"]
        q = quantize_nvfp4(x, rule=rule)
        theirs = unpacked(golden[f"{rule}.packed_padded"])[: x.shape[0], : x.shape[1]]
        scales = golden[f"{rule}.scales_rowmajor_u8"]
        spread = scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
        quotient = torch.where(spread == 0, 0.0, x.float() / (spread * q.second))
        overflows = quotient.abs() >= 7
        blocks = overflows.view(*scales.shape, 16).any(-1)
        adaptive = rule not in ("static_6", "static_4")
        free = blocks if adaptive else torch.zeros_like(blocks)
        assert torch.equal(raw(q.scales)[~free], scales[~free]), rule
        differs = unsigned_zero(q.codes) != unsigned_zero(theirs)
        allowed = overflows | free.repeat_interleave(16, 1)
        assert not bool((differs & ~allowed).any()), rule
        mine = decode_elements(q.codes, NVFP4, torch.float32)
        kept = overflows & ~free.repeat_interleave(16, 1)
        assert bool((mine[kept].abs() == 6).all()), rule


def test_columns_that_do_not_fill_their_padding():
    golden = vectors("quant/nvfp4_pad_100x48")
    x = golden["input"]
    for rule in rules(golden):
        q = quantize_nvfp4(x, rule=rule)
        theirs = unpacked(golden[f"{rule}.packed_padded"])
        padded = torch.zeros_like(theirs)
        padded[: x.shape[0], : x.shape[1]] = q.codes
        assert torch.equal(unsigned_zero(padded), unsigned_zero(theirs)), rule
        if f"{rule}.scales_swizzled_u8" in golden:
            scales = torch.zeros(theirs.shape[0], theirs.shape[1] // 16, dtype=torch.uint8)
            scales[: q.scales.shape[0], : q.scales.shape[1]] = raw(q.scales)
            swizzled = _swizzled(scales)
            assert torch.equal(swizzled, golden[f"{rule}.scales_swizzled_u8"].flatten()), rule


def _swizzled(scales: torch.Tensor) -> torch.Tensor:
    """Scales in the 128×4 order of Blackwell's tensor cores."""
    rows, columns = scales.shape
    tiles = scales.view(rows // 128, 128, columns // 4, 4).transpose(1, 2).reshape(-1, 4, 32, 4)
    return tiles.transpose(1, 2).reshape(-1, 32, 16).flatten()


def test_two_dimensional_blocks():
    golden = vectors("quant/nvfp4_block2d_bf16")
    assert rules(golden)
    for rule in rules(golden):
        q = quantize_nvfp4(golden["input"], rule=rule, tile_rows=16)
        assert torch.equal(raw(q.scales), golden[f"{rule}.scales_rowmajor_u8"]), rule
        theirs = unpacked(golden[f"{rule}.packed"])
        assert torch.equal(unsigned_zero(q.codes), unsigned_zero(theirs)), rule
        _rounds_to(q.dequantize(), golden[f"{rule}.dequant_bf16"])


def test_a_product_of_two_quantized_matrices():
    golden = vectors("quant/nvfp4_matmul_w4a4")
    for rule in RULES:
        if f"{rule}.out_bf16" not in golden:
            continue
        a, w = (quantize_nvfp4(golden[n], rule=rule).dequantize() for n in ("a", "w"))
        torch.testing.assert_close(
            (a @ w.t()).bfloat16(), golden[f"{rule}.out_bf16"], rtol=2**-7, atol=1e-4
        )


def test_rounding_and_nibbles_of_compressed_tensors():
    golden = vectors("quant/ct_nvfp4_pack")
    values = round_e2m1(golden["x"].float())
    assert torch.equal(values, golden["cast_to_fp4"].float())
    codes = e2m1_codes(values)
    assert torch.equal(codes, unpacked(golden["packed_u8"]))
    shape = (codes.shape[0], codes.shape[1] // 16)
    q = QTensor(
        NVFP4,
        codes,
        torch.ones(shape, dtype=torch.float8_e4m3fn),
        second=torch.ones(1, 1),
    )
    for name, tensor in (("compressed-tensors", "weight_packed"), ("modelopt-nvfp4", "weight")):
        packed = get_format(name).encode(q, model_dtype=torch.bfloat16)[tensor]
        assert torch.equal(packed, golden["packed_u8"]), name
