"""Re-layout keeps codes, and rounds nothing that it was not allowed to round."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from compressor.errors import InputError
from compressor.formats.base import get_format
from compressor.formats.relayout import as_asymmetric, as_symmetric, relayout
from compressor.ir.qtensor import QTensor, QuantSpec

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("compressed-tensors", "autoawq", "gptq", "gptq-v2")


def weight(zero="none", scale_dtype=F16, scales=None) -> QTensor:
    generator = torch.Generator().manual_seed(1)
    spec = QuantSpec("int", 4, "group", 32, zero=zero, scale_dtype=scale_dtype)
    if scales is None:  # values that bfloat16 and float16 both hold
        exponents = torch.randint(-12, 4, (32, 2), generator=generator)
        mantissa = 1 + torch.randint(0, 128, (32, 2), generator=generator) / 128
        scales = mantissa * torch.exp2(exponents)
    zeros = torch.randint(0, 16, (32, 2), generator=generator, dtype=torch.uint8)
    return QTensor(
        spec=spec,
        codes=torch.randint(0, 16, (32, 64), generator=generator, dtype=torch.uint8),
        scales=scales.to(scale_dtype),
        zeros=None if zero == "none" else zeros,
    )


def move(q, source, target, *, allow_rounding=False, model_dtype=BF16):
    return relayout(
        q,
        get_format(source),
        get_format(target),
        name="model.a",
        model_dtype=model_dtype,
        allow_rounding=allow_rounding,
    )


@pytest.mark.parametrize(("source", "target"), list(product(NAMES, NAMES)))
def test_there_and_back_through_files(source, target):
    for zero in ("none", "subtract"):
        if zero == "subtract" and "gptq" in (source, target):
            continue
        first, second = get_format(source), get_format(target)
        q = weight(zero)
        q = replace(q, spec=replace(q.spec, scale_dtype=first.scale_dtype(q.spec, BF16)))
        q = replace(q, scales=q.scales.to(q.spec.scale_dtype))
        read = first.decode(first.encode(q, model_dtype=BF16), q.spec)
        there, report = move(read, source, target)
        assert report is None and torch.equal(there.codes, q.codes)
        written = second.encode(there, model_dtype=BF16)
        back, report = move(second.decode(written, there.spec), target, source)
        assert report is None
        assert back.spec == q.spec and torch.equal(back.codes, q.codes)
        assert torch.equal(back.scales, q.scales)
        assert torch.equal(back.dequantize(torch.float64), q.dequantize(torch.float64))


@pytest.mark.parametrize(
    ("value", "source_dtype", "target", "error"),
    [
        (2.0**-24, BF16, "autoawq", None),  # smallest subnormal of float16
        (2.0**-23 * 1.5, BF16, "autoawq", None),
        (2.0**-15 * (1 + 1 / 128), BF16, "autoawq", None),
        (2.0**-24 * 1.25, BF16, "autoawq", 0.2),
        (2.0**-26, BF16, "autoawq", 1.0),  # flushed to zero
        (1 + 1 / 1024, F16, "compressed-tensors", (1 / 1024) / (1 + 1 / 1024)),
        (1 + 1 / 128, F16, "compressed-tensors", None),
    ],
)
def test_exact_where_it_can_be_and_measured_where_not(value, source_dtype, target, error):
    scales = torch.ones(32, 2)
    scales[3, 1] = value
    q = weight(scale_dtype=source_dtype, scales=scales)
    source = "compressed-tensors" if target == "autoawq" else "autoawq"
    if error is None:
        moved, report = move(q, source, target)
        assert report is None and float(moved.scales[3, 1]) == value
        return
    with pytest.raises(InputError, match=r"model\.a: 1 of 64") as caught:
        move(q, source, target)
    assert f"{error:.2g}" in str(caught.value)
    moved, report = move(q, source, target, allow_rounding=True)
    assert report.max_relative_error == pytest.approx(error)
    assert (report.rounded, report.total, report.name) == (1, 64, "model.a")
    assert torch.equal(moved.codes, q.codes)
    assert moved.scales.dtype == moved.spec.scale_dtype == report.target_dtype


def test_a_rounded_weight_is_off_by_what_the_report_says():
    q = weight(scales=torch.rand(32, 2) + 0.01)
    moved, report = move(q, "autoawq", "compressed-tensors", allow_rounding=True)
    before, after = q.dequantize(torch.float64), moved.dequantize(torch.float64)
    off = ((after - before).abs() / before.abs().clamp(min=1e-12)).max()
    assert float(off) == pytest.approx(report.max_relative_error)
    assert 0 < report.max_relative_error <= 2**-8


def test_overflow_is_never_rounding():
    q = weight(scale_dtype=BF16, scales=torch.full((32, 2), 1e5))
    with pytest.raises(InputError, match="infinite in torch"):
        move(q, "compressed-tensors", "gptq", allow_rounding=True)


def test_zero_points_that_version_1_of_gptq_can_hold_go_there():
    centred = replace(weight("subtract"), zeros=torch.full((32, 2), 8, dtype=torch.uint8))
    off = centred.zeros.clone()
    off[31, 1] = 1
    asymmetric = replace(centred, zeros=off)
    moved, report = move(asymmetric, "autoawq", "gptq")
    assert report is None and torch.equal(moved.dequantize(F32), asymmetric.dequantize(F32))
    off[31, 1] = 0
    with pytest.raises(InputError, match=r"model\.a: autoawq to gptq: .*gptq-v2"):
        move(asymmetric, "autoawq", "gptq", allow_rounding=True)
    assert as_symmetric(asymmetric) is None
    plain = as_symmetric(centred)
    assert plain is not None and torch.equal(plain.dequantize(F32), centred.dequantize(F32))


def test_both_forms_of_a_symmetric_weight():
    q = weight()
    asymmetric = as_asymmetric(q)
    assert asymmetric.spec.zero == "subtract"
    assert torch.equal(asymmetric.dequantize(F32), q.dequantize(F32))
    again = as_symmetric(asymmetric)
    assert again is not None and again.spec == q.spec and again.zeros is None
    assert as_symmetric(q) is q and as_asymmetric(asymmetric) is asymmetric


def test_a_dense_target_rounds_no_scale():
    q = weight("subtract", scales=torch.rand(32, 2))
    moved, report = move(q, "autoawq", "dense")
    assert report is None and moved == q


def test_a_kind_the_target_lacks_is_refused_with_its_reason():
    spec = QuantSpec("int", 3, "group", 32, scale_dtype=F16)
    q = replace(weight(), spec=spec, codes=weight().codes // 2)
    with pytest.raises(InputError, match=r"model\.a: gptq to autoawq: .*4 bits, not 3"):
        move(q, "gptq", "autoawq")
