"""Exact symmetries do not count as errors, however strong they are and however they overlap."""

from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.checkpoint.source import open_source
from compressor.ir.floats import Floats
from compressor.ir.layout import Linear, Rows, UnitLayout
from compressor.ir.qtensor import QuantSpec
from compressor.numerics import quantize
from compressor.numerics.folding import fold
from compressor.verify.compare import Difference, UnitComparison
from compressor.verify.verify import verify
from tests.support.family_checks import CPU, compiled


def differences(
    unit: UnitLayout, written: Mapping[str, Tensor], original: Mapping[str, Tensor]
) -> dict[str, Difference]:
    floats = Floats(written), Floats(original)
    comparison = UnitComparison(unit, *floats, {}, torch.bfloat16)
    return {row.name: row for row in comparison.differences()}


def test_strong_scales_at_both_ends_of_a_linear_are_seen_through(tiny_model):
    source = open_source(tiny_model("llama"))
    unit = source.layout.units[1]
    original = source.read_unit(unit).dequantized()
    generator = torch.Generator().manual_seed(0)
    written = dict(original)
    for site in unit.folds:
        rows = site.rows or Rows("", 0, original[f"{site.source}.weight"].shape[0])
        # Rows made three times as large hide that columns became half as large.
        size = 0.5 if site.kind == "norm" else 1 / 3
        scale = size * (1 + torch.rand(rows.total, generator=generator))
        scale[0] = 1e-4
        written |= fold(written, site, unit, scale)
    for found in differences(unit, written, original).values():
        assert found.error < 1e-5 and found.problem is None, found


def test_what_is_no_rescaling_is_an_error(tiny_model):
    source = open_source(tiny_model("llama"))
    unit = source.layout.units[1]
    original = source.read_unit(unit).dequantized()
    name = next(x.name for x in unit.linears if x.role == "mlp.gate")
    written = {**original, f"{name}.weight": original[f"{name}.weight"].roll(1, 0)}
    found = differences(unit, written, original)
    wrong = found.pop(name)
    assert wrong.error > 1 and wrong.problem is not None
    assert max(row.error for row in found.values()) < 1e-5


def test_a_row_of_few_inputs_is_not_shifted_by_chance():
    """Of thousands of rows of 32 inputs, some have errors that lean to one side."""
    linear = Linear("block.kv_b_proj", "attn.kv_b", 8192, 32, site="attn.kv_a")
    unit = UnitLayout("block", "block", 0, (linear.weight_name,), linears=(linear,))
    spec = QuantSpec(element="int", bits=4, strategy="group", group_size=32, zero="subtract")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(linear.shape, generator=generator)
    q = quantize(weight, spec)
    step = q.scales.float().repeat_interleave(32, 1)
    errors = torch.randn(linear.shape, generator=generator) * 0.5 * step
    leaning = errors.mean(1).abs() / errors.square().mean(1).sqrt()
    assert leaning.max() > 0.6

    def found(written: Tensor) -> str | None:
        tensors = [Floats({linear.weight_name: each}) for each in (written, weight)]
        (row,) = UnitComparison(unit, *tensors, {linear.name: spec}, torch.bfloat16).differences()
        return row.problem

    assert found(weight + errors) is None
    shifted = q.dequantize()
    shifted[7] += step[7]
    assert found(shifted) == "block.kv_b_proj: row 7 differs by more than rounding"


def test_wide_weights_behind_narrow_ones_pass_for_the_original_s(tiny_model, tmp_path):
    """GPTQ corrects them for what 3 bits did to their inputs, within what their own 8 bits do."""
    model = tiny_model("llama")
    passes = [
        {"gptq": {"bits": bits, "group_size": 8, "targets": [targets]}}
        for bits, targets in ((3, "mlp.*"), (8, "attn.*"))
    ]
    written = compiled(model, tmp_path / "out", passes)
    report = verify(written.checkpoint.folder, against=model, device=torch.device("cpu"))
    assert report.ok, report.damage


@pytest.mark.parametrize(
    ("family", "beside"),
    [
        ("bloom", "transformer.word_embeddings_layernorm.bias"),
        ("gemma4_text shared", "model.embed_tokens_per_layer.weight"),
    ],
)
def test_what_stands_beside_an_embedding_is_compared(family, beside, tiny_model, tmp_path):
    model, output = tiny_model(family), tmp_path / "out"
    compiled(model, output, [{"rtn": {"bits": 8, "group_size": 8}}])
    assert verify(output, against=model, device=CPU).ok
    (output / "manifest.json").unlink()
    state = load_file(output / "model.safetensors")
    state[beside][..., 3] += 0.1
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    report = verify(output, against=model, device=CPU)
    assert not report.ok and f"{beside}: row" in str(report)
