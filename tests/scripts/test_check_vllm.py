"""scripts/check_vllm.py: what vLLM said of one checkpoint is not said of another."""

import json
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import load


def test_every_checkpoint_has_an_answer_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, options = load("scripts/check_vllm.py"), Namespace(vllm="", vllm_option=[])
    one, other = (tmp_path / f"model-0.5B-{form}" for form in ("w4", "w8"))

    def answered(command: list[str], **how: Any) -> None:
        *_, checkpoint, _ = command
        how["stdout"].write(f"loading\n{json.dumps({'vllm': checkpoint})}\n")

    def failed(command: list[str], **how: Any) -> None:
        how["stdout"].write("ValueError: no such kernel\n")

    found = []
    for folder, run in ((one, answered), (other, failed)):
        folder.mkdir()
        monkeypatch.setattr(subprocess, "run", run)
        found.append(script.theirs(folder, tmp_path / "tokens.json", options))
    assert found == [
        {"vllm": f"{one}/out", "kernels": []},
        {"error": "ValueError: no such kernel"},
    ]
    assert {path.name for path in tmp_path.glob("*.log")} == {
        f"{one.name}.log",
        f"{other.name}.log",
    }
