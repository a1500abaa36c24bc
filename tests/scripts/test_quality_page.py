"""The page on quality follows from its figures."""

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
        "nll fiction": values,
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


def test_rows_are_added_and_replaced(quality):
    rows = [row("ours", [1.0, 2.0], top1=0.5), row("original", [1.0, 1.0], **{"nll pydoc": [3.0]})]
    new = [row("ours", [1.0, 1.5]), row("original", [2.0, 2.0]), row("theirs", [1.0, 1.0])]
    found = {r["method"]: r for r in quality.joined(rows, new)}
    assert list(found) == ["original", "ours", "theirs"]
    assert found["ours"]["nll fiction"] == [1.0, 1.5]
    assert found["original"]["nll fiction"] == [2.0, 2.0]
    assert found["original"]["nll pydoc"] == [3.0]


def test_another_model_has_tables_of_its_own(quality):
    rows = [
        row(method, [v, v + 0.1], model=model, calibration=read, **{"kl fiction": [v, v]})
        for model in ("", "llama")
        for method, v, read in (
            ("rtn", 3.0, ""),
            ("autoround", 2.0, "speeches"),
            ("ours", 1.5, "speeches"),
        )
        if model or method != "autoround"
    ]
    page = quality.page({"rows": rows, "about": [], "grids": {"g": "G"}})
    first, second = page.split("## Small llama: G")
    assert "`ours`" in first and "`autoround`" not in first
    assert "`ours`, calibrated on the speeches, against `autoround` (nats): better" in second
    assert "in all -0.5000 ± 0.0000; KL -0.5000 ± 0.0000" in second
