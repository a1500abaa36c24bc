"""What units give to later blocks beside hidden states: inputs made of tokens, keys and values."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.checkpoint.source import open_source
from compressor.errors import InputError, Interrupted
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution, sweep
from tests.support.recipes import short_recipe

CPU = choose_device("cpu")
SHARED = "gemma4_text shared"

TinyModel = Callable[..., Path]


@torch.no_grad()
def test_rows_of_other_lengths_have_their_own(tiny_model: TinyModel) -> None:
    """Padded on the left, in batches that divide them otherwise than the model."""
    folder = tiny_model(SHARED)
    ids = torch.randint(2, 256, (3, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    side = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    model = SourceModel(open_source(folder), device=CPU, dtype=torch.float32)
    for step in sweep(model, ids, side=side, execution=Execution(2)):
        step.run()
    with model.logits() as head:
        ours = torch.stack([head(hidden) for hidden in step.stream.hidden])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = theirs(input_ids=ids, use_cache=False, **side).logits
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_rows_carry_what_later_blocks_read_and_the_plan_counts_it(tiny_model: TinyModel) -> None:
    model = SourceModel(open_source(tiny_model(SHARED)), device=CPU, dtype=torch.float32)
    ids = torch.randint(2, 256, (2, 16), generator=torch.Generator().manual_seed(2))
    held = []
    for step in sweep(model, ids, execution=Execution(1)):
        held.append(sum(tensor[0, ..., 0].numel() for tensor in step.stream.handed.values()))
        numbers = sum(tensor.numel() for tensor in step.stream.handed.values())
        step.run()
        if step.index == 1:
            assert numbers == ids.numel() * model.layout.sizes.given
    assert {name.partition("/")[0] for name in step.stream.handed} == {"shared_kv_states"}
    numbers = sum(tensor.numel() for tensor in step.stream.handed.values())
    assert numbers == ids.numel() * model.layout.sizes.published
    others = open_source(tiny_model("gemma4_text dense"))
    assert not others.arch.runtime.handed and others.layout.sizes.published == 0


def test_a_run_goes_on_to_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, done = tiny_model(SHARED), []
    passes = [{"gptq": {"bits": 4, "group_size": 8}}]
    compile_checkpoint(prepare(short_recipe(model, tmp_path / "whole", passes), device=CPU))
    with pytest.raises(Interrupted):
        compile_checkpoint(
            prepare(short_recipe(model, tmp_path / "out", passes), device=CPU),
            on_unit=lambda unit: done.append(unit.name),
            stopping=lambda: len(done) >= 4,
        )
    compile_checkpoint(prepare(short_recipe(model, tmp_path / "out", passes), device=CPU))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert len(done) == 4 and one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_blocks_tuned_against_the_original_have_its_keys(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    passes = [{"signround": {"bits": 4, "group_size": 8, "steps": 2}}]
    report = compile_checkpoint(
        prepare(short_recipe(tiny_model(SHARED), tmp_path / "out", passes), device=CPU)
    )
    assert open_source(report.output).schemes.linears["model.layers.3.self_attn.q_proj"].weight


def test_projections_that_nobody_reads_are_left_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(SHARED), folder)
    state = load_file(folder / "model.safetensors")
    extra = "model.layers.3.self_attn.k_proj.weight"
    save_file({**state, extra: torch.ones(96, 64)}, folder / "model.safetensors")
    source = open_source(folder)
    assert extra not in source.checkpoint.entries
    assert any("left out" in note and extra in note for note in source.checkpoint.notes)
    state["model.layers.3.self_attn.k_proj.bias"] = torch.ones(96)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no place for 1 tensor.*k_proj\.bias"):
        open_source(folder)


@pytest.mark.parametrize(
    ("family", "passes", "message"),
    [
        (
            "glm_moe_dsa shared",
            [{"emulator": {"pads": [1, 1], "keep": 1}}],
            "read what earlier ones hand to them",
        ),
        (
            SHARED,
            [{"reorder": {"targets": ["attn.o"]}}, "rtn"],
            "not values by head of this block",
        ),
    ],
)
def test_what_would_part_blocks_that_share_is_refused(
    family: str, passes: list[Any], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(short_recipe(tiny_model(family), tmp_path / "out", passes), device=CPU)
