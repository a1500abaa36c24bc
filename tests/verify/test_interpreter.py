"""Where Triton's interpreter may prove kernels on a CPU."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

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
