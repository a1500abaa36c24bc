"""Packed experts that are decoded when they are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.errors import InputError
from compressor.ir.layout import weight_name
from compressor.plan.recipe import make_recipe
from compressor.run.session import compile_checkpoint, prepare
from compressor.verify.coded_later import assembled_but_experts

CPU = torch.device("cpu")


def test_experts_stand_for_what_they_do_at_once_and_name_themselves_where_they_are_damaged(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = {
        "model": str(tiny_model("qwen3_moe", num_hidden_layers=1)),
        "output": str(tmp_path / "out"),
        "passes": [{"rtn": {"bits": 4, "group_size": 32}}],
        "verify": False,
    }
    made = compile_checkpoint(prepare(make_recipe(recipe), device=CPU)).output
    source = open_source(made)
    layout = source.layout.units[1]
    tensors = source.checkpoint.read(source.names(layout))
    whole = source.assemble(layout, tensors)
    rest, later = assembled_but_experts(source, layout, tensors)
    assert {*rest.quantized, *(name.rpartition(".")[0] for name in later)} == {*whole.quantized}
    for name, q in whole.quantized.items():
        if weight_name(name) in later:
            assert torch.equal(later[weight_name(name)].dequantize(), q.dequantize())
    expert = next(x.name for x in layout.linears if x.expert == 1)
    tensors[f"{expert}.weight_shape"] = tensors[f"{expert}.weight_shape"] + 3
    _, later = assembled_but_experts(source, layout, tensors)
    with pytest.raises(InputError, match=expert):
        later[weight_name(expert)].dequantize()
