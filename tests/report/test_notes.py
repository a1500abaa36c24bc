"""What a run says of its layers beside errors, where people see it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressor.checkpoint.source import open_source
from compressor.cli.main import cli
from compressor.report.notes import kept_rows, row_notes


def test_alike_notes_are_one_line_and_counts_are_summed():
    rows = [
        {"pass": "nvfp4", "linear": "a", "note": "values saturate at 6", "noted": 3},
        {"pass": "nvfp4", "linear": "b"},
        {"pass": "nvfp4", "linear": "c", "note": "values saturate at 6", "noted": 1200},
        {"pass": "gptq", "linear": "d", "note": "its Gram matrix is not finite"},
    ]
    assert row_notes(rows) == [
        "nvfp4: 1,203 values saturate at 6, in 2 layers",
        "gptq: its Gram matrix is not finite, in 1 layer",
    ]
    assert row_notes([]) == []


def test_rows_that_keep_the_nearest_codes_are_counted_for_each_pass():
    rows = [
        {"pass": "gptq", "rows": 64, "rows_kept_nearest": 3},
        {"pass": "gptq", "rows": 1024, "rows_kept_nearest": 0},
        {"pass": "progressive", "rows": 32, "rows_kept_nearest": 32},
        {"pass": "kv_cache"},
    ]
    first, second = kept_rows(rows)
    assert first.startswith("gptq: 3 of 1,088 outputs keep")
    assert second.startswith("progressive: 32 of 32 outputs keep")


def run_and_report(recipe: dict[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """What a run into `out` of the folder prints, and its report."""
    whole = {**recipe, "output": str(folder / "out"), "verify": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(whole))
    result = CliRunner().invoke(cli, ["run", str(folder / "recipe.yaml"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads((folder / "out" / "report.json").read_text())


def test_a_run_says_them(tiny_model, tmp_path):
    recipe = {
        "model": str(tiny_model("mixtral")),
        "calibration": {"samples": 4, "length": 16},
        "passes": [
            {"streaming": {"sinks": 2, "window": 8}},
            {"gptq": {"bits": 4, "group_size": 32}},
        ],
    }
    said, report = run_and_report(recipe, tmp_path)
    rows = [row for unit in report["units"] for row in unit["rows"]]
    kept = sum(row.get("rows_kept_nearest", 0) for row in rows)
    assert f"  noted       gptq: {kept:,} of " in said
    few = [line for line in row_notes(rows) if "came here: rounded to nearest" in line]
    assert few and all(f"  noted       {line}" in said for line in few)
    assert set(few) <= set(report["warnings"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "came here: rounded to nearest" in page
    assert report["learned"] == [{"pass": "streaming", "name": "sinks", "sinks": 2}]
    assert "What was learned" in page and "name: sinks, sinks: 2" in page


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("everything", [False, True])
def test_experts_without_tokens_have_scales_and_a_line_that_says_so(
    family: str, everything: bool, tiny_model, tmp_path
):
    tokens = 8
    recipe = {
        "model": str(tiny_model(family)),
        "calibration": {"samples": 1, "length": tokens, "all_experts": everything},
        "passes": [{"gptq": {"bits": 8, "activations": "static", "min_tokens": tokens}}],
    }
    _, report = run_and_report(recipe, tmp_path)
    rows = [row for unit in report["units"] for row in unit["rows"] if "routed" in row]
    downs = [row for row in rows if "down_proj" in row["linear"] or row["linear"].endswith("w2")]
    source = open_source(tmp_path / "out")
    blocks = source.layout.blocks
    chosen = source.checkpoint.config["num_experts_per_tok"]
    assert sum(row["routed"] for row in downs) == tokens * chosen * len(blocks)
    assert any(row["routed"] < tokens for row in downs)
    assert any("came here" in text for text in report["warnings"]) is not everything
    assert "Tokens seen by experts" in (tmp_path / "out" / "report.html").read_text()
    scales = [name for name in source.checkpoint.entries if name.endswith("input_scale")]
    found = torch.cat([x.flatten() for x in source.checkpoint.read(scales).values()])
    assert len(found) > len(downs) and bool((found > 0).all()) and bool(found.isfinite().all())


def test_inputs_that_overflow_are_counted(tiny_model, tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e23
    save_file(tensors, file, {"format": "pt"})
    recipe = {
        "model": str(tmp_path / "model"),
        "calibration": {"samples": 4, "length": 16},
        "passes": [{"gptq": {"bits": 4, "group_size": 32}}],
    }
    said, report = run_and_report(recipe, tmp_path)
    (told,) = (x for x in said.splitlines() if "not finite and are left out" in x)
    count = int(told.split("gptq: ")[1].split()[0])
    assert 0 < count <= 64 and told.endswith("in 1 layer")
    assert any("left out of all statistics" in x for x in report["warnings"])
