"""MXFP4 and MXFP8 equal to compressed-tensors', ModelOpt's and gpt-oss's, bit for bit."""

import pytest
import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.gpt_oss.codec import FORMAT as GPT_OSS
from compressor.formats.shared.e2m1 import unpack_nibbles
from compressor.ir.qtensor import E8M0, MXFP4, MXFP8, QTensor
from compressor.numerics import quantize
from compressor.numerics.mx import largest_exponent, nvfp4_of_mxfp4
from tests.support.golden_files import vectors, vectors_and_notes


def by_group(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, 32))


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
def test_mxfp4_of_compressed_tensors(dtype):
    """Theirs takes scales in the weight's dtype; in float16 very small and very large groups have
    none there and get 1, in ours they keep their own."""
    golden = vectors(f"formats/ct_mxfp4_{dtype}")
    q = quantize(golden["input"], MXFP4, rule="nearest")
    absmax = by_group(golden["input"].float()).abs().amax(-1)
    same = q.scales.view(torch.uint8) == golden["weight_scale"]
    assert bool((golden["weight_scale"][~same] == 127).all())
    without = (absmax < 2.0**-13) | (absmax > 2.0**15) if dtype == "fp16" else ~same
    assert bool((same | without).all()) and (dtype == "fp16" or bool(same.all()))
    theirs = unpack_nibbles(golden["weight_packed"])
    assert torch.equal(by_group(q.codes)[same], by_group(theirs)[same])
    made = by_group(q.dequantize(torch.bfloat16))[same]
    assert torch.equal(made, by_group(golden["dequant"])[same])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_mxfp8_of_compressed_tensors(dtype):
    golden = vectors(f"formats/ct_mxfp8_{dtype}")
    q = quantize(golden["input"], MXFP8, rule="nearest")
    assert torch.equal(q.scales.view(torch.uint8), golden["weight_scale"])
    assert torch.equal(q.codes, golden["weight_u8"])
    assert torch.equal(q.dequantize(torch.bfloat16), golden["dequant"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_mxfp4_of_modelopt(dtype):
    """Its ties go towards zero, ours to the even code, and its zeros have a sign of their own."""
    golden = vectors(f"formats/modelopt_mxfp4_{dtype}")
    w, theirs = golden["input"].float(), unpack_nibbles(golden["weight"])
    q = quantize(golden["input"], MXFP4, rule="ceil")
    assert torch.equal(q.scales.view(torch.uint8), golden["weight_scale"])
    differs = (q.codes & 7) != (theirs & 7)
    scales = q.scales.double().repeat_interleave(32, 1)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    tie = ((w.double() / scales).abs()[..., None] == middles).any(-1)
    assert bool((tie | ~differs).all()) and bool(differs.any())
    assert torch.equal((q.codes & 7)[differs], (theirs & 7)[differs] + 1)
    signed = (q.codes & 7 != 0) & ~differs
    assert torch.equal(q.codes[signed], theirs[signed])
    read = QTensor(MXFP4, theirs, golden["weight_scale"].view(E8M0))
    assert torch.equal(read.dequantize(golden["dequant"].dtype), golden["dequant"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_mxfp8_of_modelopt(dtype):
    golden = vectors(f"formats/modelopt_mxfp8_{dtype}")
    q = quantize(golden["input"], MXFP8, rule="ceil")
    assert torch.equal(q.scales.view(torch.uint8), golden["weight_scale"])
    assert torch.equal(q.codes, golden["weight_u8"])
    assert torch.equal(q.dequantize(golden["dequant"].dtype), golden["dequant"])


def experts_of_gptoss(blocks, scales):
    """Each expert's weight of a stack."""
    pairs = zip(blocks, scales, strict=True)
    return [GPT_OSS.decode({"blocks": b, "scales": s}, MXFP4) for b, s in pairs]


def test_experts_of_gptoss():
    golden = vectors("formats/gptoss_mxfp4")
    names = {name.rpartition(".")[2]: name for name in golden}
    parts = {}
    for projection in ("gate_up_proj", "down_proj"):
        stacked = [golden[names[f"{projection}_{part}"]] for part in ("blocks", "scales")]
        parts[projection] = experts_of_gptoss(*stacked)
        for q, *theirs in zip(parts[projection], *stacked, strict=True):
            packed = GPT_OSS.encode(q, model_dtype=torch.bfloat16)
            for leaf, stored in zip(("blocks", "scales"), theirs, strict=True):
                assert torch.equal(packed[leaf], stored)
    values = [q.dequantize(torch.bfloat16).t() for q in parts["gate_up_proj"]]
    assert torch.equal(torch.stack(values), golden["gate_up_dequant_bf16"])
    values = [q.dequantize(torch.bfloat16).t() for q in parts["down_proj"]]
    assert torch.equal(torch.stack(values), golden["down_dequant_bf16"])
    for expert, q in enumerate(parts["gate_up_proj"]):
        for first, name in enumerate(("gate", "up")):
            expected = golden[f"{name}_proj_out_in"][expert]
            assert torch.equal(q.dequantize(expected.dtype)[first::2], expected)


def test_every_exponent_of_gptoss():
    """Byte 255 is NaN in the specification, where transformers reads 2^128."""
    golden = vectors("formats/gptoss_mxfp4_all_exponents")
    blocks, scales = (golden[n] for n in sorted(k for k in golden if k != "dequant_bf16"))
    with pytest.raises(InputError, match="NaN"):
        experts_of_gptoss(blocks, scales)
    finite = (scales[0] != 255).all(-1)
    assert int(finite.sum()) == 255
    (q,) = experts_of_gptoss(blocks[:, finite], scales[:, finite])
    made = q.dequantize(torch.bfloat16).t()
    expected = golden["dequant_bf16"][0]
    expected = expected[:, finite] if expected.shape[1] == len(finite) else expected[finite].t()
    assert torch.equal(made, expected)


@pytest.mark.parametrize("name", ["inrange", "outrange"])
def test_mxfp4_to_nvfp4(name):
    """Theirs counts a group of the smallest scale as lossless whatever its codes are; outside the
    window it rounds, where ours refuses."""
    golden, notes = vectors_and_notes(f"formats/mxfp4_to_nvfp4_{name}")
    q = QTensor(MXFP4, unpack_nibbles(golden["mx_packed"]), golden["mx_scale"].view(E8M0))
    assert torch.equal(q.dequantize(torch.bfloat16), golden["source_bf16"])
    assert largest_exponent(q) == int(notes["k_max"])
    if name == "outrange":
        with pytest.raises(InputError, match="groups have a scale more than"):
            nvfp4_of_mxfp4(q)
        near = (golden["mx_scale"].int() >= int(notes["k_max"]) + 127 - 17).all(1)
        assert bool(near.any())
        q = QTensor(MXFP4, q.codes[near], q.scales[near])
        made = nvfp4_of_mxfp4(q, largest=int(notes["k_max"]))
        golden = {key: x[near] if x.dim() == 2 else x for key, x in golden.items()}
    else:
        made = nvfp4_of_mxfp4(q)
    assert made.second is not None
    assert torch.equal(made.second.reshape(()), golden["weight_scale_2"].reshape(()))
    assert torch.equal(made.dequantize(), q.dequantize())
    assert torch.equal(made.dequantize(), golden["source_bf16"].float())
    assert torch.equal(made.codes & 7, unpack_nibbles(golden["weight"]) & 7)
    filled = ((made.codes & 7) != 0).unflatten(1, (-1, 16)).any(-1)
    scales = made.scales.view(torch.uint8)
    assert torch.equal(scales[filled], golden["weight_scale_u8"][filled])
