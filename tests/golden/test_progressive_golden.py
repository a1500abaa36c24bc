"""QoQ's weights, keys and values, and QServe's tensors equal deepcompressor's, bit for bit."""

import pytest
import torch

from compressor.formats.base import get_format
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec
from compressor.numerics import quantize
from compressor.numerics.activations import fake_quantize_kv
from tests.support.golden_files import vectors

CASES = ("gauss", "heavy", "outlier_cols", "shifted")
FORMS = {"postscale": "offset", "prescale": "subtract"}
INT8 = ActivationSpec("int8", "token")


def progressive(golden: dict[str, torch.Tensor], zero: str) -> QTensor:
    weight = golden["weight_fp16"]
    size = weight.shape[1] // golden["postscale.s2_i8"].shape[1]
    spec = QuantSpec("int", 4, "group", size, zero=zero, scale_dtype=torch.int8, second="channel")
    return quantize(weight, spec)


def per_channel(golden: dict[str, torch.Tensor]) -> QTensor:
    spec = QuantSpec("int", 4, "channel", zero="offset", scale_dtype=torch.float16)
    return quantize(golden["weight_fp16"], spec)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_progressive_groups(case, form):
    golden = vectors(f"quant/qoq_progressive_{case}")
    q = progressive(golden, FORMS[form])
    assert torch.equal(q.second.flatten(), golden[f"{form}.s1_fp32"])
    assert torch.equal(q.scales, golden[f"{form}.s2_i8"])
    assert torch.equal(q.zeros.float(), golden[f"{form}.zero"])
    assert torch.equal(q.codes, golden[f"{form}.codes_u4"])
    assert torch.equal(q.dequantize(torch.float16), golden[f"{form}.dequant_fp16"])
    int8 = (q.dequantize(torch.float64) / q.second.double()).round()
    assert torch.equal(int8, golden[f"{form}.int8_recon"].double())
    assert int8.min() >= -128 and int8.max() <= 127


@pytest.mark.parametrize("case", CASES)
def test_one_scale_per_channel(case):
    golden = vectors(f"quant/qoq_progressive_{case}")
    q = per_channel(golden)
    assert torch.equal(q.scales.flatten(), golden["gchn.scale"].flatten())
    assert torch.equal(q.zeros.flatten(), golden["gchn.scaled_zero"].flatten())
    assert torch.equal(q.codes, golden["gchn.codes_u4"])


@pytest.mark.parametrize("case", CASES)
def test_qserve_tensors(case):
    golden = vectors(f"quant/qoq_progressive_{case}")
    fmt = get_format("qserve")
    weights = {"qserve": progressive(golden, "offset"), "gchn.qserve": per_channel(golden)}
    for prefix, q in weights.items():
        tensors = fmt.encode(q, model_dtype=torch.float16, input=INT8)
        names = {"qweight": "qweight_i8"}
        for name, tensor in tensors.items():
            expected = golden[f"{prefix}.{names.get(name, name)}"]
            assert torch.equal(tensor, expected), (prefix, name)
        stored = {key for key in golden if key.startswith(f"{prefix}.")}
        assert len(stored) == len(tensors)
        read = fmt.decode(tensors, q.spec)
        assert torch.equal(read.codes, q.codes)
        assert torch.equal(read.dequantize(), q.dequantize())


def test_keys_and_values_of_four_bits():
    golden = vectors("quant/qoq_kv4_a8")
    tokens, heads = golden["kv4.scale"].shape
    by_head = golden["kv_fp16"].view(1, tokens, heads, -1).transpose(1, 2)
    made = fake_quantize_kv(by_head, KVSpec("int4", "token_head"))
    assert torch.equal(made.transpose(1, 2).reshape(tokens, -1), golden["kv4.dequant"])
