"""Where Triton's interpreter may prove kernels on a CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from compressor.plan.recipe import make_recipe
from compressor.run.session import compile_checkpoint, prepare
from compressor.verify.kernels import check as kernel_checks


@pytest.mark.parametrize(
    "installed, runs", [("3.6.0", False), ("3.7.1", True), ("3.10.0", True), ("4.0.0", True)]
)
def test_an_interpreter_that_stumbles_is_not_asked(
    installed: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    undecided(monkeypatch)
    monkeypatch.setattr(kernel_checks, "version", lambda name: installed)
    kernel_checks.enable_interpreter()
    assert kernel_checks.interpreter_runs() == runs


def test_no_triton_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    undecided(monkeypatch)
    monkeypatch.setattr(kernel_checks, "version", missing)
    kernel_checks.enable_interpreter()
    assert not kernel_checks.interpreter_runs()


def test_asking_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    undecided(monkeypatch)
    monkeypatch.setattr(kernel_checks, "version", lambda name: "4.0.0")
    assert not kernel_checks.interpreter_runs()
    monkeypatch.setitem(sys.modules, "triton", kernel_checks)
    kernel_checks.enable_interpreter()
    assert not kernel_checks.interpreter_runs()


def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process on a CPU that has not imported Triton."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.skipif(kernel_checks._triton() < kernel_checks.INTERPRETER, reason="too old")
def test_a_conversion_is_proved_by_it(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own: what it imports on its way may bring Triton with it."""
    if torch.cuda.is_available():
        pytest.skip("Triton is left to the GPU")
    output = tmp_path / "packed"
    passes = [{"rtn": {"bits": 4, "group_size": 32, "symmetric": False}}]
    recipe = {"model": str(tiny_model("llama", dtype=torch.float16)), "output": str(output)}
    compile_checkpoint(
        prepare(make_recipe({**recipe, "passes": passes}), device=torch.device("cpu"))
    )
    words = ["convert", str(output), str(tmp_path / "out"), "--format", "autoawq", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "compressor", *words, "--device", "cpu"],
        env=environment, capture_output=True, check=True, text=True,
    )  # fmt: skip
    packed = [x for x in json.loads(done.stdout)["verify"]["layers"] if x["kernel"]]
    assert len(packed) == 14 and all(layer["triton"] for layer in packed)
