"""What a family computes in float32 stays so where the rest of a model is narrower."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.checkpoint.source import open_source
from compressor.runner.source_model import SourceModel

IDS = torch.randint(2, 256, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "nemotron_h"])
def test_routers_and_their_corrections_stay_in_float32(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    state = load_file(model / "model.safetensors")
    wide = {n: t.float() + 1e-4 for n, t in state.items() if "e_score_correction_bias" in n}
    assert wide
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({**state, **wide}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((model / "config.json").read_text())
    source = open_source(folder)
    ours = SourceModel(source, device=torch.device("cpu"), dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hidden = ours.runner.embed(ours.tensors(0), IDS)
    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    for index, unit in enumerate(source.layout.units):
        if unit.kind != "block":
            continue
        with ours.runner.loaded(unit, ours.tensors(index)) as block:
            names = ours.runner.names
            for name, tensor in block.layer.state_dict().items():
                same = expected[f"{names.layers}.{unit.index}.{name}"]
                assert tensor.dtype == same.dtype and torch.equal(tensor, same), name
            hidden = block.forward(hidden)
    assert hidden.dtype == torch.bfloat16 and bool(hidden.isfinite().all())
