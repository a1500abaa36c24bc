"""The runner of measurements, and what its rows are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.scripts import load


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load("scripts/measure/run.py")


def test_rows_are_kept_and_resumed_from(
    runner: ModuleType,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "rows.json"
    options = [str(tiny_model("llama")), "--samples", "2", "--length", "32", "--windows", "2"]
    options += ["--window", "24", "--device", "cpu", "--json", str(kept)]
    passes = ["rtn: {bits: 4, group_size: 32}", "[smoothquant, rtn: {bits: 9}]"]
    runner.run("passes", [*options, "--pass", *passes])
    said = capsys.readouterr().out
    rows = json.loads(kept.read_text())["rows"]
    assert set(rows) == {"unquantized", *passes}
    assert rows["unquantized"]["figures"]["kl"] == [0.0, 0.0]
    assert "failed" in rows[passes[1]]["figures"] and "bits" in rows[passes[1]]["figures"]["failed"]
    # | name | perplexity | kl | ratio | …
    (line,) = (x for x in said.splitlines() if x.startswith(f"| {passes[0]}"))
    assert line.count("±") == 2
    rows["unquantized"]["figures"]["nll"] = [0.0, 0.0]
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "rows": rows}))
    runner.run("passes", [*options, "--pass", *passes])
    assert "| unquantized | 1.000 |" in capsys.readouterr().out
