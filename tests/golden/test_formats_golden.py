"""Packed words equal to those of AutoAWQ, exllama and compressed-tensors, bit for bit."""

import pytest
import torch

from compressor.errors import InputError
from compressor.formats.base import ModelSchemes, get_format
from compressor.formats.shared.words import pack_words, unpack_words
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape
from tests.support.golden_files import vectors

F16 = torch.float16


def awq_weight(golden, case) -> QTensor:
    """The QTensor of one packing case, made from its codes, zeros and scales [in, out]."""
    codes, zeros = golden[f"{case}.int_weight_in_out_u8"], golden[f"{case}.int_zero_u8"]
    size = codes.shape[0] // zeros.shape[0]
    spec = QuantSpec("int", 4, "group", size, zero="subtract", scale_dtype=F16)
    return QTensor(
        spec=spec,
        codes=codes.t().contiguous(),
        scales=golden[f"{case}.scales"].t().contiguous(),
        zeros=zeros.t().contiguous(),
    )


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_awq_words(case):
    golden, fmt = vectors("quant/awq_gemm_packing"), get_format("autoawq")
    q = awq_weight(golden, case)
    tensors = fmt.encode(q, model_dtype=F16)
    assert set(tensors) == {"qweight", "qzeros", "scales"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, golden[f"{case}.{name}"]), name
    read = fmt.decode(tensors, q.spec)
    assert torch.equal(read.codes, q.codes) and torch.equal(read.zeros, q.zeros)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_awq_values(case):
    """Theirs multiplies in float16: one rounding of (q − z)·s, which float32 holds exactly."""
    golden = vectors("quant/awq_gemm_packing")
    q = awq_weight(golden, case)
    assert torch.equal(q.dequantize(F16).t(), golden[f"{case}.dequantize_gemm_in_out_fp16"])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_exllama_words_are_gptq_version_1(case):
    golden = vectors("quant/awq_gemm_packing")
    q = awq_weight(golden, case)
    if int(q.zeros.min()) == 0:
        with pytest.raises(InputError, match="zero points of 0"):
            get_format("gptq").encode(q, model_dtype=F16)
        return
    tensors = get_format("gptq").encode(q, model_dtype=F16)
    assert torch.equal(tensors["qweight"], golden[f"{case}.exllama_qweight"])
    assert torch.equal(tensors["qzeros"], golden[f"{case}.exllama_qzeros"])


def unsigned(signed: torch.Tensor, bits: int) -> torch.Tensor:
    return (signed.int() + 2 ** (bits - 1)).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_words(bits):
    """Theirs is from before elements crossed words, which only 3 bits could tell."""
    golden = vectors("quant/ct_pack_to_int32")
    codes, zeros = unsigned(golden[f"q{bits}"], bits), unsigned(golden[f"zp{bits}"], bits)
    words, packed_zeros = golden[f"q{bits}.packed_dim1"], golden[f"zp{bits}.packed_dim0"]
    for crossing in (False,) if bits == 3 else (False, True):
        assert torch.equal(pack_words(codes, bits, crossing=crossing), words)
        assert torch.equal(unpack_words(words, bits, codes.shape[1], crossing=crossing), codes)
        assert torch.equal(pack_words(zeros.t(), bits, crossing=crossing).t(), packed_zeros)
        read = unpack_words(packed_zeros.t(), bits, zeros.shape[0], crossing=crossing).t()
        assert torch.equal(read, zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compressed_tensors_files(bits):
    golden, fmt = vectors("quant/ct_pack_to_int32"), get_format("compressed-tensors")
    codes, columns = unsigned(golden[f"q{bits}"], bits), unsigned(golden[f"zp{bits}"], bits)
    rows = codes.shape[0]
    q = QTensor(
        spec=QuantSpec("int", bits, "group", codes.shape[1], zero="subtract"),
        codes=codes,
        scales=torch.ones(rows, 1),
        zeros=columns[:rows, :1].contiguous(),
    )
    tensors = fmt.encode(q, model_dtype=torch.float32)
    assert torch.equal(tensors["weight_packed"], golden[f"q{bits}.packed_dim1"])
    full = rows * bits // 32  # words that hold nothing but these rows
    packed = golden[f"zp{bits}.packed_dim0"]
    assert torch.equal(tensors["weight_zero_point"][:full], packed[:full, :1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["sym", "asym"])
def test_integers_beside_int8_inputs_are_packed(bits, zeros):
    golden, fmt = vectors(f"formats/ct_wna8_w{bits}_{zeros}"), get_format("compressed-tensors")
    names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    tensors = {name: golden[name] for name in names if name in golden}
    zero = "subtract" if zeros == "asym" else "none"
    spec = QuantSpec("int", bits, "group", 64, zero=zero, scale_dtype=torch.bfloat16)
    q = fmt.decode(tensors, spec)
    assert torch.equal(q.dequantize(torch.bfloat16), golden["dequant"])
    inputs = ActivationSpec("int8", "token")
    written = fmt.encode(q, model_dtype=torch.bfloat16, input=inputs)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    config = fmt.config(ModelSchemes(linears={"m": Scheme(spec, inputs)}))
    assert config["format"] == "pack-quantized"
    shapes = {n: TensorShape(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert fmt.schemes(config, {"m": shapes}).linears["m"] == Scheme(spec, inputs)


def test_w4afp8_is_packed_int4_beside_fp8_inputs():
    golden, fmt = vectors("formats/w4afp8"), get_format("compressed-tensors")
    spec = QuantSpec("int", 4, "group", 128, scale_dtype=torch.bfloat16)
    input = ActivationSpec("fp8_e4m3", "token")
    codes = (golden["ct_int.weight"].to(torch.int16) + 8).to(torch.uint8)
    q = QTensor(spec=spec, codes=codes, scales=golden["ct_int.weight_scale"])
    tensors = fmt.encode(q, model_dtype=torch.bfloat16, input=input)
    theirs = {k.partition(".")[2]: v for k, v in golden.items() if k.startswith("ct_pack.")}
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    assert torch.equal(fmt.decode(theirs, spec).dequantize(torch.bfloat16), golden["dequant"])
    (group,) = fmt.config(ModelSchemes({"a": Scheme(spec, input)}))["config_groups"].values()
    assert group["format"] == "pack-quantized"
    entry = group["input_activations"]
    assert (entry["num_bits"], entry["type"], entry["strategy"]) == (8, "float", "token")


def test_fp8_blocks_of_transformers():
    """Their scales are rounded otherwise in the last bit; given those the codes are theirs."""
    golden, fmt = vectors("formats/fp8_block_tf_float"), get_format("fp8")
    size = golden["weight_u8"].shape[0] // golden["weight_scale_inv"].shape[0]
    assert size == 128
    tensors = {
        "weight": golden["weight_u8"].view(torch.float8_e4m3fn),
        "weight_scale_inv": golden["weight_scale_inv"],
    }
    spec = QuantSpec("fp8_e4m3", 8, "block", block=(128, 128), scale_dtype=torch.float32)
    q = fmt.decode(tensors, spec)
    assert torch.equal(q.dequantize(torch.float32).bfloat16(), golden["dequant_bf16"])
    again = fmt.encode(
        q, model_dtype=torch.bfloat16, input=ActivationSpec("fp8_e4m3", "group", 128)
    )
    assert all(
        torch.equal(again[name].view(torch.uint8), tensors[name].view(torch.uint8))
        for name in tensors
    )
