"""The runner of measurements, and what its rows are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.scripts import load


def test_rows_are_kept_and_resumed_from(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, runner = tmp_path / "rows.json", load("scripts/measure/run.py")
    options = [
        str(tiny_model("llama", tie_word_embeddings=True)),
        "--samples",
        "2",
        "--length",
        "32",
        "--windows",
        "2",
    ]
    options += ["--window", "24", "--device", "cpu", "--json", str(kept)]
    passes = ["rtn: {bits: 4, group_size: 32}", "[smoothquant, rtn: {bits: 9}]"]
    passes.append("[rotate, rtn: {bits: 4, group_size: 32}]")
    monkeypatch.setattr("sys.argv", ["run.py", *options, "--pass", *passes])
    runner.main()
    said = capsys.readouterr().out
    found = json.loads(kept.read_text())
    original, row, rotated = found["rows"]
    assert (original["method"], row["method"]) == ("original", passes[0])
    assert rotated["method"] == passes[2] and rotated["kl fiction"][0] > 0  # its head is untied
    assert original["kl fiction"] == [0.0, 0.0] and row["kl fiction"][0] > 0
    assert f"{passes[1]}: failed: passes.1.rtn.bits is 9" in said
    assert f"| `{passes[0]}` |" in said and "passes.1" not in said.partition("## ")[2]
    original["nll fiction"] = [0.0, 0.0]
    kept.write_text(json.dumps(found))
    runner.main()
    assert "| original |  | 1.00 |" in capsys.readouterr().out


def test_a_method_gets_the_grid_in_its_last_pass() -> None:
    runner = load("scripts/measure/run.py")
    words = ["M", "--grids", "w4-g32", "nvfp4", "--methods", "rtn", "awq + gptq"]
    assert list(runner.wanted(runner.parser().parse_args(words))) == [
        ("w4-g32", "rtn", [{"rtn": {"bits": 4, "group_size": 32}}]),
        ("w4-g32", "awq + gptq", [{"awq": {}}, {"gptq": {"bits": 4, "group_size": 32}}]),
        ("nvfp4", "rtn", [{"nvfp4": {}}]),
        ("nvfp4", "awq + gptq", [{"awq": {}}, {"gptq": {"grid": "nvfp4"}}]),
    ]
