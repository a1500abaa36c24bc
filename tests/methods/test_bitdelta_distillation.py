"""The student of scale distillation: base plus signs, with gradients through every block."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.checkpoint.delta.base import base_weights
from compressor.checkpoint.source import open_source
from compressor.methods.bitdelta.distillation import Student
from compressor.numerics.bitdelta import SignDelta, sign_delta
from compressor.runner.source_model import SourceModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma2"])
def test_its_logits_and_gradients_are_those_of_the_merged_model(
    model_type: str, tiny_model: Callable[..., Path]
) -> None:
    """Of scales in the first and the last block, so that gradients cross the delta's branches."""
    base = open_source(tiny_model(model_type))
    fine = SourceModel(open_source(tiny_model(model_type, seed=1)), device=CPU, dtype=torch.float32)
    blocks = [u for u in fine.layout.units if u.kind == "block"]
    linears = [x.name for u in blocks for x in u.linears if x.role != "router"]

    def weights(index: int) -> Mapping[str, Tensor]:
        unit = fine.layout.units[index]
        return base_weights(base, [x.name for x in unit.linears if x.name in linears])

    student = Student(fine, weights, bits=2)
    assert list(student.rows) == linears
    ids = torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    teacher = student.logits(ids, merging=False).detach()
    student.loss(ids).backward()
    gradient = student.scales.grad
    assert gradient is not None and bool((gradient != 0).all())

    def dense(scales: Tensor) -> Tensor:
        """The logits of a plain model whose weights were added up beforehand."""
        merged = SourceModel(fine.source, device=CPU, dtype=torch.float32)
        original = merged.tensors

        def tensors(index: int) -> dict[str, Tensor]:
            found = original(index)
            for name, weight in weights(index).items():
                row = student.rows[name.removesuffix(".weight")]
                delta = sign_delta(found[name] - weight, bits=2)
                added = SignDelta(delta.signs, scales[row], delta.in_features)
                found[name] = added.merged(weight, torch.float32)
            return found

        merged.tensors = tensors  # type: ignore[method-assign]
        logits: Tensor = merged.whole()(input_ids=ids, use_cache=False).logits.detach()
        return logits

    now = student.scales.detach()
    torch.testing.assert_close(
        student.logits(ids, merging=True).detach(), dense(now), atol=1e-5, rtol=1e-5
    )
    for row in (0, len(linears) - 1):
        ends = []
        for step in (1e-3, -1e-3):
            moved = now.clone()
            moved[row, 0] += step
            ends.append(float((dense(moved) - teacher).double().square().mean()))
        assert float(gradient[row, 0]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.02)
    student.close()
    assert torch.equal(student.logits(ids, merging=True).detach(), teacher)
