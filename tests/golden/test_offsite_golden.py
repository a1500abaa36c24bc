"""Offsite-Tuning against vectors of its published code: which blocks are kept, both losses and
their gradients, emulator and plugged model. The vectors' teacher runs in float32, as ours does on a
CPU; the published one runs in float16 always, and its loss is in the files beside it."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.checkpoint.records import Records
from compressor.checkpoint.source import Source, open_source
from compressor.methods.emulator.borders import record_borders
from compressor.methods.emulator.distillation import Distill, Student
from compressor.methods.emulator.method import evenly
from compressor.numerics.border_loss import border_loss
from compressor.runner.kept_blocks import with_blocks
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution
from tests.support.golden_files import vectors, vectors_and_notes

CPU = torch.device("cpu")
PADS = (2, 2)


def base(name: str, folder: Path) -> tuple[Source, dict[str, Tensor], dict[str, Any]]:
    """The full model of a stack's vectors as a checkpoint."""
    tensors, about = vectors_and_notes(f"systems/offsite_stack_{name}")
    weights = {n.removeprefix("base."): t for n, t in tensors.items() if n.startswith("base.")}
    config = json.loads(about["config"])
    config["dtype"] = "float16"
    config["tie_word_embeddings"] = not any("lm_head" in n for n in weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return open_source(folder), tensors, about


def test_kept_blocks_are_the_published_ones() -> None:
    tensors = vectors("systems/offsite_layer_choice")
    halves = 0
    for (blocks, left, right, keep), kept, half in zip(
        tensors["n_l_r_k"].tolist(),
        tensors["kept_base_index"],
        tensors["has_exact_half"],
        strict=True,
    ):
        found = [left + i for i in evenly(blocks - left - right, keep)]
        assert found == [i for i in kept.tolist() if i >= 0]
        halves += int(half)
    assert halves


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_losses_and_gradients_of_a_distillation_step(name: str, tmp_path: Path) -> None:
    source, tensors, about = base(name, tmp_path)
    kept = (0, 1, *json.loads(about["kept_base_index"]), 6, 7)
    shorter = with_blocks(source, kept)
    teacher, model = (SourceModel(s, device=CPU, dtype=torch.float32) for s in (source, shorter))
    ids = tensors["input_ids"]
    borders = record_borders(
        teacher, ids, pads=PADS, batch=2, scratch=Records(tmp_path / "scratch", "test")
    )
    torch.testing.assert_close(
        borders.inputs.read([0, 1]), tensors["student_input"], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        borders.outputs.read([0, 1]), tensors["teacher_output"], atol=1e-5, rtol=1e-4
    )
    settings = Distill(steps=1, batch=2, lr=1e-4, warmup=0, lm_weight=1.0, kd_weight=30.0, clip=1.0)
    units = shorter.layout.blocks[2:4]
    for rows_at_once in (2, 1):  # the teacher's size is that of the whole batch in both
        with ExitStack() as stack:
            student = Student(model, units, settings, stack)
            execution = Execution(rows_at_once)
            measured = student.measure(borders, ids, [0, 1], execution)
            assert measured.border == pytest.approx(float(tensors["kd_loss"]), rel=1e-4)
            assert measured.lm == pytest.approx(float(tensors["lm_loss"]), rel=1e-4)
            total = student.gradients(borders, ids, [0, 1], execution)
            assert total == pytest.approx(float(tensors["total_loss"]), rel=1e-4)
            leaving = student.middle(tensors["student_input"])
            torch.testing.assert_close(
                leaving.detach(), tensors["student_output"], atol=1e-5, rtol=1e-4
            )
            found = gradients(student, source, units)
    for key in (key for key in tensors if key.startswith("grad.student.")):
        torch.testing.assert_close(
            found[key.removeprefix("grad.student.")], tensors[key], atol=1e-6, rtol=1e-3
        )
    norms = [float(found[key].norm()) for key in json.loads(about["student_param_names"])]
    torch.testing.assert_close(torch.tensor(norms), tensors["grad_norms"], atol=1e-6, rtol=1e-3)


def gradients(student: Student, source: Source, units: Any) -> dict[str, Tensor]:
    """Gradients under the names of the published code; GPT-2 keeps linears [in, out]."""
    turned = {x.weight_name for unit in units for x in unit.linears if x.transposed}
    found = {}
    for name, parameter in student.trained.items():
        unit = next(u for u in units if name.startswith(f"{u.name}."))
        gradient = parameter.grad
        assert gradient is not None
        key = f"{unit.index - PADS[0]}.{name.removeprefix(unit.name + '.')}"
        found[key] = gradient.T if name in turned else gradient
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_emulator_computes_what_the_published_one_does(name: str, tmp_path: Path) -> None:
    source, tensors, about = base(name, tmp_path)
    kept = (0, 1, *json.loads(about["kept_base_index"]), 6, 7)
    shorter = with_blocks(source, kept)
    for one, key in ((source, "full.logits"), (shorter, "emulator.logits")):
        model = SourceModel(one, device=CPU, dtype=torch.float32).whole()
        with torch.no_grad():
            logits = model(tensors["input_ids"], use_cache=False).logits
        torch.testing.assert_close(logits, tensors[key], atol=1e-4, rtol=1e-4)


def test_the_border_loss_knows_no_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    loss = border_loss(student, teacher)
    assert float(border_loss(teacher, teacher)) == 0
    torch.testing.assert_close(border_loss(student * 40, teacher * 40), loss)
    torch.testing.assert_close(loss, ((teacher - student) ** 2).mean() / (teacher**2).mean())
