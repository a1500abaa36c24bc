"""Models on the Hub: headers for a plan, safetensors and text for a run, clear words otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def folder(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository: a checkpoint, and beside it files that must stay where they are."""
    folder = tmp_path_factory.mktemp("repo")
    tiny_models.build("llama", folder, dtype=torch.bfloat16, num_hidden_layers=6)
    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (folder / "NOTICE").write_text("made by others")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    driver = Path(__file__).with_name("hub_client.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_headers_are_read_and_no_weights(
    command: str, results: dict[str, Any], folder: Path
) -> None:
    result = results[command]
    assert result["code"] == 0, result["errors"]
    size = (folder / "model.safetensors").stat().st_size
    # The client asks for the first 100 KB, in which a header nearly always is.
    assert 0 < result["served"].get("model.safetensors", 0) <= 100_001 < size / 4
    assert set(result["served"]) <= {"config.json", "model.safetensors"}


def test_a_run_fetches_safetensors_and_text_only(results: dict[str, Any], folder: Path) -> None:
    result = results["run"]
    assert result["code"] == 0, result["errors"]
    size = (folder / "model.safetensors").stat().st_size
    assert result["served"]["model.safetensors"] == size
    assert {"tokenizer.json", "NOTICE"} <= set(result["served"])
    assert not {"pytorch_model.bin", "modeling_evil.py"} & set(result["served"])


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("gated", 2, ["gated", "accept it at", "hf auth login"]),
        ("missing", 2, ["no model 'org/missing'", "check the spelling"]),
        ("pickled", 2, ["no safetensors", "never loaded"]),
        ("revision", 2, ["no revision 'nowhere'"]),
        ("broken", 3, ["did not answer", "check the network"]),
        ("down", 3, ["did not answer", "check the network"]),
    ],
)
def test_what_to_do_is_said(
    name: str, code: int, words: list[str], results: dict[str, Any]
) -> None:
    result = results[name]
    assert result["code"] == code, result["errors"]
    assert "Traceback" not in result["errors"]
    for word in words:
        assert word in result["errors"], result["errors"]
