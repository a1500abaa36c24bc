"""The runner of measurements, and what its rows are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compressor.checkpoint.source import open_source
from compressor.methods.base import pass_names
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe
from tests.support.scripts import load, measurement


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load("scripts/measure/run.py")


@pytest.fixture(scope="module")
def low_bit() -> ModuleType:
    return measurement("low_bit")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt"])
def test_planted_outliers_change_no_bit(
    model_type: str, low_bit: ModuleType, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(model_type, dtype=torch.bfloat16)
    low_bit.plant_outliers(folder, tmp_path / "planted")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (folder, tmp_path / "planted")
    ]
    ids = torch.arange(2, 40)[None]
    a, b = (model(ids).logits for model in models)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    before, after = (
        model.get_parameter(
            "model.layers.1.input_layernorm.weight"
            if model_type != "opt"
            else "model.decoder.layers.1.self_attn_layer_norm.weight"
        )
        for model in models
    )
    assert int((after == before * low_bit.FACTOR).sum()) == low_bit.CHANNELS


def test_every_low_bit_row_plans(low_bit: ModuleType, tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("llama", hidden_size=128, intermediate_size=256))
    rows = low_bit.rows_of(64)
    assert {name for pair in low_bit.CLAIMS for name in pair} <= set(rows)
    for name, passes in rows.items():
        steps = [entry if isinstance(entry, str) else next(iter(entry)) for entry in passes]
        assert set(steps) <= set(pass_names())
        data = {"model": "m", "output": "o", "passes": list(passes), **low_bit.recipe_keys(name)}
        make_plan(make_recipe(data), source)


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
    passes = ["--pass", "rtn: {bits: 4, group_size: 32}", "--pass", "rtn: {bits: 9}"]
    assert runner.run("awq", [*options, *passes]) == 0
    said = capsys.readouterr().out
    rows = json.loads(kept.read_text())["rows"]
    assert set(rows) == {"unquantized", passes[1], passes[3]}
    assert rows["unquantized"]["figures"]["kl"] == [0.0, 0.0]
    assert "failed" in rows[passes[3]]["figures"] and "bits" in rows[passes[3]]["figures"]["failed"]
    # | name | perplexity | kl | ratio | …
    (line,) = (x for x in said.splitlines() if x.startswith(f"| {passes[1]}"))
    assert line.count("±") == 2
    rows["unquantized"]["figures"]["nll"] = [0.0, 0.0]
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "rows": rows}))
    runner.run("awq", [*options, *passes])
    assert "| unquantized | 1.000 |" in capsys.readouterr().out


def test_streaming_is_measured_along_a_text(
    runner: ModuleType, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    options = ["--device", "cpu", "--window", "8", "--chunk", "16", "--times", "20", "--full"]
    options += ["--sinks", "0", "2", "--json", str(tmp_path / "rows.json")]
    runner.run("streaming", [str(tiny_model("llama")), *options])
    rows: list[dict[str, Any]] = [
        row["figures"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"].values()
    ]
    none, two, full = rows
    assert len(none["nll"]) == 20
    # Before anything is evicted all see the same.
    assert none["first window"] == pytest.approx(full["first window"], rel=1e-4)
    assert two["last window"] != pytest.approx(full["last window"], rel=1e-3)
    # 2 layers x 2 KV heads x 16 channels, keys and values in float32.
    assert [row["cache bytes"] // (2 * 2 * 16 * 2 * 4) for row in rows] == [7, 9, 160]


def test_memory_that_grows_or_was_not_planned_is_told() -> None:
    judge = measurement("memory").judge
    row = {"host": 100, "host planned": 110, "device": 0, "device planned": 0}
    assert list(judge({"4 layers": row, "16 layers": row})) == []
    more = {**row, "host": 150}
    assert len(list(judge({"4 layers": row, "16 layers": more}))) == 2
