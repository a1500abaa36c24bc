"""The runner of measurements, and what its rows are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.scripts import load, measurement


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load("scripts/measure/run.py")


def test_a_difference_is_in_standard_errors(runner: ModuleType) -> None:
    rows = {
        "four": {"nll": [1.0, 2.0, 3.0, 4.0], "top1": 0.5},
        "nearest four": {"nll": [1.1, 2.1, 3.1, 4.1], "top1": 0.4},
        "nearest three": {"nll": [1.5, 1.5, 3.5, 3.6], "top1": 0.4},
    }
    pairs = [("four", "nearest four"), ("four", "nearest three"), ("four", "not measured")]
    first, second = runner.claims(rows, pairs)
    assert first == "four against nearest four: nll +0.1000 ± 0.0000 better"
    assert second.endswith("none")


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
    assert runner.run("passes", [*options, "--pass", *passes]) == 0
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


def test_memory_that_grows_or_was_not_planned_is_told() -> None:
    judge = measurement("memory").judge
    row = {"host": 100, "host planned": 110, "device": 0, "device planned": 0}
    assert list(judge({"4 layers": row, "16 layers": row})) == []
    more = {**row, "host": 150}
    assert len(list(judge({"4 layers": row, "16 layers": more}))) == 2
