"""The second reader agrees with the first on every format, and complains about damage."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from compressor.formats.base import ModelSchemes, get_format
from compressor.formats.second_reader.decode import decode_linear
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import Scheme

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("compressed-tensors", "autoawq", "gptq", "gptq-v2")


def as_file_holds(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array with the tensor's bytes: bfloat16 as uint16, float8 as uint8."""
    if tensor.dtype == BF16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def weight(spec: QuantSpec, shape, seed: int) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = spec.scale_shape(*shape)
    zeros = torch.randint(0, 2**spec.bits, groups, generator=generator, dtype=torch.uint8)
    return QTensor(
        spec=spec,
        codes=torch.randint(0, 2**spec.bits, shape, generator=generator, dtype=torch.uint8),
        scales=(torch.randn(groups, generator=generator) / 50).to(spec.scale_dtype),
        zeros=None if spec.symmetric else zeros,
    )


def cases(name: str):
    """Random specs and shapes that a format accepts."""
    generator = np.random.default_rng(7)
    fmt, found = get_format(name), 0
    while found < 60:
        rows, groups = int(generator.integers(1, 9)) * 8, int(generator.integers(1, 5))
        size = int(generator.choice([8, 16, 32, 20]))
        strategy = str(generator.choice(["group", "channel", "tensor"]))
        spec = QuantSpec(
            element="int",
            bits=int(generator.integers(1, 9)),
            strategy=strategy,  # type: ignore[arg-type]
            group_size=size if strategy == "group" else None,
            zero="none" if generator.random() < 0.5 else "subtract",
        )
        spec = replace(spec, scale_dtype=fmt.scale_dtype(spec, BF16))
        if name == "autoawq":
            spec = replace(spec, bits=4)
        if fmt.accepts(Scheme(weight=spec), (rows, groups * size)) is None:
            found += 1
            q = weight(spec, (rows, groups * size), found)
            if q.zeros is not None and fmt.lacks(q):
                q = replace(q, zeros=q.zeros.clamp(min=1))
            yield q


@pytest.mark.parametrize("name", NAMES)
def test_two_readers_agree(name):
    fmt = get_format(name)
    for q in cases(name):
        linears = {"model.a": Scheme(weight=q.spec), "lm_head": Scheme()}
        config = json.loads(json.dumps(fmt.config(ModelSchemes(linears=linears))))
        tensors = fmt.encode(q, model_dtype=BF16)
        arrays = {key: as_file_holds(t) for key, t in tensors.items()}
        found = decode_linear(config, "model.a", arrays)
        assert found.weight.dtype == np.float64
        assert np.array_equal(found.weight, q.dequantize(torch.float64).numpy())
        assert np.array_equal(found.codes, q.codes.numpy())
        assert np.array_equal(found.scales, q.scales.double().numpy())
        head = decode_linear(config, "lm_head", {"weight": np.ones((3, 2), np.float16)})
        assert head.codes is None and np.array_equal(head.weight, np.ones((3, 2)))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_float_weight_is_read_as_it_is(dtype):
    values = torch.randn(5, 7).to(dtype)
    found = decode_linear(None, "a", {"weight": as_file_holds(values)})
    assert np.array_equal(found.weight, values.double().numpy())
    assert found.codes is None and found.scales is None


def test_an_input_order_is_honoured():
    spec = QuantSpec("int", 4, "group", 32, zero="subtract", scale_dtype=F16)
    q, fmt = weight(spec, (32, 64), 3), get_format("gptq-v2")
    arrays = {k: as_file_holds(t) for k, t in fmt.encode(q, model_dtype=F16).items()}
    config = fmt.config(ModelSchemes(linears={"a": Scheme(weight=spec)}))
    order = np.random.default_rng(0).permutation(arrays["g_idx"])
    found = decode_linear(config, "a", {**arrays, "g_idx": order}).weight
    zeros, scales = q.zeros.double().numpy(), q.scales.double().numpy()
    for i, group in enumerate(order):
        column = (q.codes[:, i].double().numpy() - zeros[:, group]) * scales[:, group]
        assert np.array_equal(found[:, i], column)


def ct_config(format: str, **weights):
    group = {"targets": ["Linear"], "format": format, "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def test_every_float8_byte():
    raw = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    raw[raw % 128 == 127] = 0  # the two NaN
    config = ct_config("float-quantized", type="float", num_bits=8, strategy="channel")
    scales = (torch.rand(16, 1) + 0.5).to(BF16)
    arrays = {"weight": raw.numpy(), "weight_scale": as_file_holds(scales)}
    expected = raw.view(torch.float8_e4m3fn).double() * scales.double()
    assert np.array_equal(decode_linear(config, "a", arrays).weight, expected.numpy())


def test_int8_and_blocks():
    values = torch.randint(-128, 128, (6, 10)).to(torch.int8)
    scales = torch.rand(3, 3).half()
    config = ct_config("int-quantized", type="int", strategy="block", block_structure=[2, 4])
    found = decode_linear(config, "a", {"weight": values.numpy(), "weight_scale": scales.numpy()})
    for i in range(6):
        for j in range(10):
            expected = float(values[i, j]) * float(scales[i // 2, j // 4])
            assert found.weight[i, j] == expected
    assert np.array_equal(found.codes, (values.int() + 128).numpy())


def test_nvfp4_by_hand():
    packed = np.full((1, 8), 0x2F, np.uint8)  # low nibble 15 = −6, high nibble 2 = 1
    arrays = {
        "weight_packed": packed,
        "weight_scale": np.array([[0x40]], np.uint8),  # E4M3 2.0
        "weight_global_scale": np.array([4.0], np.float32),
    }
    found = decode_linear(ct_config("nvfp4-pack-quantized", type="float"), "a", arrays)
    assert found.weight.tolist() == [[-3.0, 0.5] * 8]
    assert found.codes.tolist() == [[15, 2] * 8] and found.scales.tolist() == [[0.5]]


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_a_value_error_with_the_tensors_name(name):
    fmt = get_format(name)
    spec = QuantSpec("int", 4, "group", 32, scale_dtype=F16)
    config = fmt.config(ModelSchemes(linears={"a": Scheme(weight=spec)}))
    tensors = fmt.encode(weight(spec, (32, 64), 1), model_dtype=F16)
    arrays = {key: as_file_holds(t) for key, t in tensors.items()}
    for damaged, array in arrays.items():
        changes = [array.astype(np.complex64), np.concatenate([array, array]), array[:-1]]
        changes.append(array[..., None])
        if array.dtype == np.float16:
            changes.append(np.full_like(array, np.nan))
        if damaged == "g_idx":
            changes.append(array + 100)
        for change in changes:
            with pytest.raises(ValueError) as caught:
                decode_linear(config, "a", {**arrays, damaged: change})
            assert any(key in str(caught.value) for key in arrays)
        rest = {key: value for key, value in arrays.items() if key != damaged}
        with pytest.raises(ValueError, match=f"{damaged}|weight"):
            decode_linear(config, "a", rest)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "awq", "bits": 3}, "bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "groups of 0"),
        ({"quant_method": "gptq", "bits": 0}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        (ct_config("marlin-24"), "marlin-24"),
        (ct_config("pack-quantized", num_bits=9), "num_bits"),
    ],
)
def test_an_unknown_config_is_a_value_error(config, said):
    with pytest.raises(ValueError, match=said):
        decode_linear(config, "a", {"qweight": np.zeros((32, 4), np.int32)})
