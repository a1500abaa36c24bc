"""The list of checks: what is added to it is shown every unit, and its word counts."""

import shutil
from pathlib import Path

import pytest
import torch

from compressor.plan.recipe import make_recipe
from compressor.run.session import compile_checkpoint, prepare
from compressor.verify import verify as verifying
from compressor.verify.checks.base import Check
from compressor.verify.kernels import bitdelta
from compressor.verify.kernels import check as kernel_checks
from compressor.verify.verify import CHECKS, verify
from tests.support.tiny_models import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def delta(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("delta")
    fine = build("llama", made / "fine", seed=1)
    steps = [{"bitdelta": {"base": str(base), "distill": "none"}}]
    recipe = {"model": str(fine), "output": str(made / "out"), "passes": steps}
    return compile_checkpoint(
        prepare(make_recipe({**recipe, "format": "bitdelta"}), device=CPU)
    ).output


class Counted(Check):
    def begin(self):
        self.tensors, self.packed = set(), 0

    def read(self, tensors):
        self.tensors |= set(tensors)

    def layer(self, linear, layer):
        self.packed += 1

    def conclude(self):
        wrong = [] if self.packed else ["nothing is packed"]
        self.found.add("counted", wrong, f"{len(self.tensors)} tensors, {self.packed} layers")


def test_an_added_check_sees_checkpoints_and_deltas_alike(base, delta, monkeypatch):
    monkeypatch.setattr(verifying, "CHECKS", (*CHECKS, Counted))
    monkeypatch.setattr(kernel_checks, "interpreter_runs", lambda: False)
    whole = verify(base, device=CPU)
    assert not whole.ok and whole.damage == ("nothing is packed",)
    found = verify(delta, base=str(base), device=CPU)
    assert found.ok
    count = found.checks[-1].detail
    assert found.checks[-1].name == "counted" and count.endswith(" 14 layers")
    assert {layer.kernel for layer in found.layers} == {"delta_matmul"}


def test_a_wrong_product_of_a_delta_is_named(base, delta, monkeypatch):
    monkeypatch.setattr(kernel_checks, "interpreter_runs", lambda: False)
    right = bitdelta.delta_matmul_ref
    wrong = lambda x, signs, alpha, *, base_out: right(x, signs, alpha * 1.05, base_out=base_out)  # noqa: E731
    monkeypatch.setattr(bitdelta, "delta_matmul_ref", wrong)
    report = verify(delta, base=str(base), device=CPU)
    assert [check.name for check in report.checks if not check.ok] == ["kernels"]
    assert "delta_matmul gives" in report.damage[0]


def test_a_config_that_is_cut_short_is_damage(delta, tmp_path):
    cut = Path(shutil.copytree(delta, tmp_path / "cut"))
    (cut / "config.json").write_text((cut / "config.json").read_text()[:40])
    report = verify(cut, device=CPU)
    assert not report.ok and any("config.json" in text for text in report.damage)
