"""The page on quality follows from its figures."""

from __future__ import annotations

import json

import pytest

from tests.support.scripts import load


@pytest.fixture(scope="module")
def quality():
    return load("scripts/quality_page.py")


def row(method, values, **more):
    return {
        "grid": "g",
        "method": method,
        "top1": 0.5,
        "calibration": "",
        "nll moby": values,
        **more,
    }


def test_the_page_is_up_to_date(quality):
    data = json.loads((quality.DOCS / "quality.json").read_text("utf-8"))
    assert (quality.DOCS / "quality.md").read_text("utf-8") == quality.page(data)


def test_only_differences_beyond_two_standard_errors_count(quality):
    plain = row("rtn", [2.0, 2.0, 2.0, 2.0])
    clear = row("ours", [1.0, 1.1, 1.0, 1.1], calibration="speeches")
    noisy = row("noisy", [1.0, 3.1, 1.0, 3.0], calibration="speeches")
    said = list(quality.claims([plain, clear, noisy]))
    assert "`ours`" in said[0] and "better on Moby-Dick -0.950" in said[0]
    assert "`noisy`" in said[1] and "level on Moby-Dick" in said[1]
    assert len(said) == 2


def test_another_program_is_held_against_ours_of_the_same_method(quality):
    ours = [row(m, [1.0, 1.1], calibration="speeches") for m in ("gptq", "awq", "awq + gptq")]
    theirs = [row(f"gptqmodel {m}", [2.0, 2.1], calibration="speeches") for m in ("gptq", "awq")]
    said = [line.partition(" (nats)")[0] for line in quality.claims([*ours, *theirs])]
    on = "calibrated on the speeches, against"
    assert said == [
        f"- `awq + gptq`, {on} `awq`",
        f"- `gptqmodel awq`, {on} `awq`",
        f"- `gptqmodel gptq`, {on} `gptq`",
    ]


def test_rows_are_added_and_replaced(quality, tmp_path):
    figures = {"top1": 0.5, "nll moby": [1.0, 2.0], "kl moby": [0.1, 0.1], "seconds": 1.23}
    rows = {"g: ours": {"figures": figures}, "g: lost": {"figures": {"failed": "why"}}}
    file, data = tmp_path / "rows.json", {"rows": []}
    for top1 in (0.5, 0.75):
        figures["top1"] = top1
        file.write_text(json.dumps({"settings": {"calibration": "bundled"}, "rows": rows}))
        quality.add(data, file)
    assert [(r["method"], r["calibration"], r["top1"]) for r in data["rows"]] == [
        ("ours", "mixture", 0.75)
    ]


def test_another_model_has_tables_of_its_own(quality, tmp_path):
    file, data = tmp_path / "rows.json", {"rows": [], "about": [], "grids": {"g": "G"}}
    names = {"original": 1.0, "g: rtn": 3.0, "g: autoround": 2.0, "g: ours": 1.5}
    for folder in ("smol", "llama"):
        rows = {
            name: {"figures": {"top1": 0.5, "nll fiction": [v, v + 0.1], "kl fiction": [v, v]}}
            for name, v in names.items()
            if folder == "llama" or name != "g: autoround"
        }
        settings = {"calibration": "speeches.txt", "model": f"/there/{folder}"}
        file.write_text(json.dumps({"settings": settings, "rows": rows}))
        quality.add(data, file)
    first, second = quality.page(data).split("## Small llama: G")
    assert "`ours`" in first and "`autoround`" not in first
    assert "`ours`, calibrated on the speeches, against `autoround` (nats): better" in second
    assert "in all -0.5000 ± 0.0000; KL -0.5000 ± 0.0000" in second
