"""What codecs refuse: specs and configs they cannot hold, damaged tensors, by name."""

from dataclasses import replace

import pytest
import torch

from compressor.errors import InputError
from compressor.formats.base import Format, ModelSchemes, get_format
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from tests.support.int_weights import same, weight

BF16, F16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({"transform_config": {"a": 1}}, "transform_config"),
        ({"config_groups": {"g": {"targets": ["Linear"], "output_activations": {}}}}, "output_act"),
        ({"config_groups": {"g": ["Linear"]}}, "config_groups.g"),
        ({"config_groups": None}, "config_groups"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "int"}}, "kv_cache_scheme"),
        ({"ignore": ["re:("]}, "regular expression"),
    ],
)
def test_what_a_config_declares_beyond_us_is_refused_by_key(change, said):
    fmt = get_format("compressed-tensors")
    spec = QuantSpec("int", 4, "group", 32, scale_dtype=BF16)
    config = {**fmt.config(ModelSchemes(linears={"a": Scheme(weight=spec)})), **change}
    with pytest.raises(InputError, match=said):
        fmt.schemes(config, {"a": fmt.layout(spec, (32, 32), model_dtype=BF16)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"actorder": "group"}, "actorder"),
        ({"num_bits": 9}, "num_bits"),
        ({"num_bits": "4"}, "num_bits"),
        ({"group_size": 0}, "group_size"),
        ({"type": "float"}, "float"),
        ({"strategy": "tensor_group"}, "strategy"),
    ],
)
def test_a_weight_entry_beyond_us_is_refused_by_key(change, said):
    fmt = get_format("compressed-tensors")
    spec = QuantSpec("int", 4, "group", 32, scale_dtype=BF16)
    config = fmt.config(ModelSchemes(linears={"a": Scheme(weight=spec)}))
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(InputError, match=said):
        fmt.schemes(config, {"a": fmt.layout(spec, (32, 32), model_dtype=BF16)})


@pytest.mark.parametrize("name", ["autoawq", "gptq", "gptq-v2"])
def test_one_bit_width_and_group_size_per_checkpoint(name):
    a, b = (QuantSpec("int", 4, "group", size, scale_dtype=F16) for size in (32, 64))
    with pytest.raises(InputError, match="one bit width and group size"):
        get_format(name).config(
            ModelSchemes(linears={"a": Scheme(weight=a), "b": Scheme(weight=b)})
        )


def test_names_that_loaders_would_confuse():
    spec = Scheme(weight=QuantSpec("int", 4, "group", 32, scale_dtype=F16))
    linears = {"l.0.mlp.gate": Scheme(), "l.0.mlp.gate_proj": spec, "lm_head": Scheme()}
    with pytest.raises(InputError, match="gate_proj"):
        get_format("autoawq").config(ModelSchemes(linears=linears))
    config = get_format("gptq").config(ModelSchemes(linears=linears))
    assert list(config["dynamic"]) == ["-:^l\\.0\\.mlp\\.gate$"]
    assert config["lm_head"] is False


@pytest.mark.parametrize(
    ("name", "change", "shape", "said"),
    [
        ("compressed-tensors", {"bits": 9}, (32, 32), "9 bits"),
        ("compressed-tensors", {"zero": "offset"}, (32, 32), "zero points"),
        ("compressed-tensors", {"second": "channel"}, (32, 32), "second-level"),
        ("compressed-tensors", {"strategy": "block", "block": (16, 16)}, (32, 32), "blocks"),
        ("compressed-tensors", {"group_size": 24}, (32, 32), "do not divide"),
        ("autoawq", {"bits": 3}, (32, 32), "4 bits, not 3"),
        ("autoawq", {"strategy": "tensor"}, (32, 32), "per tensor"),
        ("autoawq", {}, (36, 32), "36 outputs"),
        ("gptq-v2", {"bits": 5}, (32, 32), "not 5"),
        ("gptq-v2", {"bits": 3, "group_size": 8}, (32, 40), "40 inputs of 3 bits"),
        ("gptq-v2", {}, (36, 32), "36 outputs of 4 bits"),
    ],
)
def test_refusals_before_any_work(name, change, shape, said):
    spec = replace(QuantSpec("int", 4, "group", 32, scale_dtype=F16), **change)
    reason = get_format(name).accepts(Scheme(weight=spec), shape)
    assert reason is not None and said in reason


@pytest.mark.parametrize("name", ["autoawq", "gptq", "gptq-v2", "dense"])
def test_quantized_inputs_are_refused_here_and_float_linears_taken(name):
    scheme = Scheme(
        weight=QuantSpec("int", 4, "group", 32, scale_dtype=F16),
        input=ActivationSpec("fp8_e4m3", "token"),
    )
    assert get_format(name).accepts(scheme, (32, 32))
    assert get_format(name).accepts(Scheme(), (31, 33)) is None


def fmt_and_weight(name) -> tuple[Format, QTensor]:
    return get_format(name), weight(4, "group", 32, "none", (32, 64), F16)


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq", "gptq", "gptq-v2"])
def test_values_that_break_the_spec_are_not_written(name):
    fmt, q = fmt_and_weight(name)
    scales = q.scales.clone()
    scales[0, 0] = torch.nan
    for broken, said in (
        (replace(q, scales=scales), "NaN"),
        (replace(q, codes=torch.full_like(q.codes, 16)), "codes"),
        (replace(q, scales=q.scales[:, :1]), "scales"),
        (replace(q, scales=q.scales.float()), "scales"),
        (replace(q, zeros=torch.zeros(32, 2, dtype=torch.uint8)), "zero points"),
    ):
        with pytest.raises(InputError, match=said):
            fmt.encode(broken, model_dtype=F16)


@pytest.mark.parametrize("name", ["compressed-tensors", "autoawq", "gptq", "gptq-v2"])
def test_every_damaged_tensor_is_named(name):
    fmt, q = fmt_and_weight(name)
    tensors = fmt.encode(q, model_dtype=F16)
    for damaged, tensor in tensors.items():
        changes = [tensor.to(torch.float64), torch.cat([tensor, tensor]), tensor[:-1]]
        if tensor.is_floating_point():
            changes.append(torch.full_like(tensor, torch.inf))
        for change in changes:
            with pytest.raises(InputError) as caught:
                fmt.decode({**tensors, damaged: change}, q.spec)
            assert any(f"'{n}'" in str(caught.value) for n in tensors)
    for missing in set(tensors) - {"g_idx"}:
        with pytest.raises(InputError, match=missing):
            fmt.decode({k: v for k, v in tensors.items() if k != missing}, q.spec)


def test_gptq_version_1_and_a_zero_point_of_0():
    spec = QuantSpec("int", 4, "group", 32, zero="subtract", scale_dtype=F16)
    q = replace(weight(4, "group", 32, "subtract", (32, 64), F16), spec=spec)
    v1 = get_format("gptq")
    assert v1.accepts(Scheme(weight=spec), (32, 64)) is None
    assert "gptq-v2" in (v1.may_lack(Scheme(weight=spec)) or "")
    assert get_format("gptq-v2").may_lack(Scheme(weight=spec)) is None
    with pytest.raises(InputError, match="zero points of 0"):
        v1.encode(q, model_dtype=F16)
    shifted = replace(q, zeros=q.zeros.clamp(min=1))
    assert same(v1.decode(v1.encode(shifted, model_dtype=F16), spec), shifted)
    stored = v1.encode(shifted, model_dtype=F16)
    with pytest.raises(InputError, match="qzeros"):
        v1.decode({**stored, "qzeros": torch.full_like(stored["qzeros"], -1)}, spec)


def test_an_order_of_inputs_is_refused_not_misread():
    fmt, q = fmt_and_weight("gptq-v2")
    tensors = fmt.encode(q, model_dtype=F16)
    order = tensors["g_idx"].flip(0)
    with pytest.raises(InputError, match="g_idx"):
        fmt.decode({**tensors, "g_idx": order}, q.spec)
    without = {name: t for name, t in tensors.items() if name != "g_idx"}
    assert same(fmt.decode(without, q.spec), q)
    ct = get_format("compressed-tensors")
    packed = ct.encode(q, model_dtype=F16)
    assert same(ct.decode({**packed, "weight_g_idx": tensors["g_idx"]}, q.spec), q)
    with pytest.raises(InputError, match="weight_g_idx"):
        ct.decode({**packed, "weight_g_idx": order}, q.spec)


def test_zero_points_off_the_centre_do_not_pass_as_symmetric():
    q = weight(4, "group", 32, "subtract", (32, 64), F16)
    for name in ("autoawq", "gptq-v2"):
        fmt = get_format(name)
        with pytest.raises(InputError, match="qzeros"):
            fmt.decode(fmt.encode(q, model_dtype=F16), replace(q.spec, zero="none"))


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(InputError) as caught:
        get_format("awq")
    assert "autoawq" in (caught.value.hint or "")
