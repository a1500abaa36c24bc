"""Models on the Hub: headers for a plan, safetensors and text for a run, clear words otherwise."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.find import _hub_errors
from compressor.errors import MachineError
from tests.support.elsewhere import Elsewhere, compress


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
    driver = Path(__file__).resolve().parents[1] / "support" / "hub_client.py"
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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "cache: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "cache: No space left"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "did not answer"),
        (TimeoutError("timed out"), "did not answer"),
    ],
)
def test_a_cache_that_cannot_be_written_is_not_the_hubs_silence(error: OSError, said: str) -> None:
    with pytest.raises(MachineError, match=said), _hub_errors("org/name", None):
        raise error


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_headers_are_read_and_no_weights(
    command: str, results: dict[str, Any], folder: Path
) -> None:
    result = results[command]
    assert result["code"] == 0, result["errors"]
    size = (folder / "model.safetensors").stat().st_size
    # The client asks for the first 100 KB, in which a header nearly always is.
    assert 0 < result["served"].get("model.safetensors", 0) <= 100_001 < size / 4
    # A plan tries the tokenizer, too.
    beside = {"tokenizer.json", "tokenizer_config.json", "NOTICE", "generation_config.json"}
    allowed = {"config.json", "model.safetensors", *(beside if command == "plan" else ())}
    assert set(result["served"]) <= allowed


def test_a_run_fetches_safetensors_and_text_only(results: dict[str, Any], folder: Path) -> None:
    result = results["run"]
    assert result["code"] == 0, result["errors"]
    size = (folder / "model.safetensors").stat().st_size
    assert result["served"]["model.safetensors"] == size
    # What came to be planned with does not come again.
    served = {*result["served"], *results["plan"]["served"]}
    assert {"tokenizer.json", "NOTICE"} <= served
    assert not {"pytorch_model.bin", "modeling_evil.py"} & served


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


def test_a_repository_in_the_cache_is_used_without_a_network(folder: Path, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE, as on the nodes of a cluster: by its name, and by a pinned commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--me--small"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: me/small, output: out, passes: [{awq: {bits: 4, group_size: 32}}]}")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    with Elsewhere(folder=tmp_path, **offline) as elsewhere:
        for name in ("me/small", f"me/small@{commit}"):
            planned = elsewhere(compress, "plan", str(recipe), "--model", name)
            assert planned["code"] == 0, planned
        changes = ("--set", "calibration.samples=2", "--set", "verify=false")
        ran = elsewhere(compress, "run", str(recipe), *changes)
        assert ran["code"] == 0, ran
        about = json.loads((tmp_path / "out" / "manifest.json").read_text())["about"]
        assert about["source"]["revision"] == commit
        missing = elsewhere(compress, "inspect", "me/other")
        assert missing["code"] == 2 and "not whole in the Hub's cache" in missing["errors"]
        (tmp_path / "me" / "others").mkdir(parents=True)
        path = elsewhere(compress, "inspect", "me/other")
        assert path["code"] == 2 and "the folder me is here" in path["errors"]
        assert "did you mean me/others?" in path["errors"]
        (cache / "snapshots" / commit / "model.safetensors").unlink()
        cut = elsewhere(compress, "plan", str(recipe))
        assert cut["code"] == 2 and "hf download me/small" in cut["errors"]
