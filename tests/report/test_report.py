"""The report: complete data, a page that needs nothing else, and no trust in what it shows."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compressor.evaluate.gate import Gate
from compressor.evaluate.perplexity import BlockError, Estimate, EvaluationResult
from compressor.report.data import Costs, Mixes, Peer, ReportData, UnitReport, write_report
from compressor.report.html import render
from compressor.report.layers import experts
from compressor.report.svg import Point, columns, dots, lines
from compressor.report.text import (
    MISSING,
    TIMES,
    counted,
    duration,
    factor,
    number,
    relative_error,
    share,
    size,
)

VOID = {"meta", "br", "wbr", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


def unit(index: int, error: float = 0.01) -> UnitReport:
    names = ("self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
    rows = tuple(
        {
            "pass": "awq",
            "linear": f"model.layers.{index}.{name}",
            "bits": 4,
            "error": error * (k + 1),
        }
        for k, name in enumerate(names)
    )
    return UnitReport(
        name=f"model.layers.{index}", seconds=1.5 + index, peak_rss=10**9 + index, rows=rows
    )


def report(**changes: Any) -> ReportData:
    evaluation = EvaluationResult(
        windows=4,
        length=64,
        tokens=252,
        nll=Estimate(2.0, 0.1),
        perplexity=Estimate(61.2345, 0.7),
        original_nll=Estimate(1.9, 0.1),
        original_perplexity=Estimate(54.9, 0.7),
        perplexity_ratio=Estimate(1.115, 0.004),
        kl=Estimate(0.0912, 0.002),
        top1=Estimate(0.81, 0.01),
        blocks=(BlockError("model.layers.0", 1e-4), BlockError("model.layers.1", 2e-4)),
    )
    rows = [row for i in range(3) for row in unit(i).rows]
    gate = Gate(kl=0.01).check(evaluation, rows, passes=[{"awq": {"bits": 4}}])
    values: dict[str, Any] = {
        "title": "tiny-w4",
        "recipe": {"model": "tiny", "passes": [{"awq": {"bits": 4, "symmetric": True}}]},
        "source": {"name": "tiny", "content": "ab" * 32},
        "format": "compressed-tensors",
        "parameters": 1_000_000,
        "units": tuple(unit(i) for i in range(3)),
        "estimates": Costs(
            source_bytes=2_000_000, output_bytes=600_000, host_bytes=10**9, seconds=4
        ),
        "spent": Costs(source_bytes=2_000_000, output_bytes=500_000, host_bytes=10**9, seconds=6),
        "verify": {
            "ok": True,
            "checks": [{"name": "hashes", "ok": True, "detail": "3"}],
            "sampled_tiles": 64,
        },
        "evaluation": evaluation.to_json(),
        "gate": gate.to_json(),
        "warnings": ("one thing",),
        "versions": {"torch": "2.13.0"},
        "hashes": {"manifest.json": "cd" * 32},
        "phases": {"run": 6.0},
        "started": "2026-01-01T00:00:00+00:00",
    }
    return ReportData(**{**values, **changes})


def test_both_files_are_written_and_readable_by_all(tmp_path: Path) -> None:
    as_json, as_html = write_report(tmp_path, report())
    plain = json.loads(as_json.read_text())
    assert plain["schema_version"] == 1 and plain["units"][2]["rows"][0]["error"] == 0.01
    assert ReportData.model_validate_json(as_json.read_text()) == report()
    assert as_html.read_text() == render(plain)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_page_stands_alone(tmp_path: Path) -> None:
    text = render(report().to_json())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"(?i)https?:|url\(|@import|src=", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    # Each plot twice: for a narrow and for a wide page.
    classes = [attrs.get("class") for tag, attrs in page.tags if tag == "svg"]
    assert len(classes) == 8 and classes.count("narrow") == classes.count("wide") == 4


def test_the_page_says_what_happened() -> None:
    text = " ".join(Page(render(report().to_json())).text)
    for said in (
        "tiny-w4",
        "files verified",
        "gate failed",
        "1 warning",
        "one thing",
        "500 kB",
        "sampled tiles",
        f"4.00{TIMES} smaller than 2 MB, 4.00 bits per weight",
        "61.23",
        "KL divergence from the original is 0.0912 ± 0.002; the gate asks for at most 0.01",
        "bits: 8",
        "mean of 2: 2.50e-2; worst model.layers.2.mlp.experts.1.up_proj: 3.00e-2",
        f"0.83{TIMES}",
        f"1.50{TIMES}",
        "2.13.0",
        "cd" * 32,
    ):
        assert said in text, said


def test_what_was_not_done_is_not_shown() -> None:
    bare = report(verify=None, evaluation=None, gate=None, warnings=(), units=(), phases={})
    text = " ".join(Page(render(bare.to_json())).text)
    assert "no verify" in text and "no gate" in text
    assert "Evaluation" not in text and "Error by layer" not in text and "Warnings" not in text


def test_nothing_in_the_data_becomes_markup() -> None:
    evil = "<script>alert('$body')</script>&\"'"
    data = report(
        title=evil,
        recipe={"model": evil, "passes": [{evil: {evil: evil}}]},
        source={evil: evil},
        format=evil,
        units=(
            unit(0),
            UnitReport(
                name=evil, seconds=1, peak_rss=1, rows=({"linear": f"a.0.{evil}", "error": 0.5},)
            ),
        ),
        verify={"ok": False, "checks": [{"name": evil, "ok": False, "detail": evil}]},
        gate={"passed": False, "checks": [{"passed": False, "message": evil}], "suggestion": evil},
        warnings=(evil,),
        versions={evil: evil},
        hashes={evil: evil},
        machine={evil: evil},
        environment=({evil: evil},),
        started=evil,
    )
    page = Page(render(data.to_json()))
    assert page.count("script") == 0
    assert sum(evil in piece for piece in page.text) >= 10, "it is shown as the text it is"


def test_numbers_that_are_none_are_dashes_not_crashes() -> None:
    nan = Estimate(math.nan, math.nan)
    broken = EvaluationResult(
        windows=1,
        length=8,
        tokens=7,
        nll=nan,
        perplexity=nan,
        perplexity_ratio=nan,
        kl=nan,
        top1=nan,
        blocks=(BlockError("a", math.nan), BlockError("b", math.inf)),
    )
    bad_rows = ({"linear": "model.layers.0.q", "error": math.nan},)
    data = report(
        evaluation=broken.to_json(),
        units=(UnitReport(name="x", seconds=0, peak_rss=0, rows=bad_rows),),
        spent=Costs(source_bytes=0, output_bytes=0, host_bytes=0, seconds=0),
    )
    text = render(data.to_json())
    Page(text)
    assert "nan" not in text and "inf" not in text.replace("information", "")


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        report(verdict="fine")


def test_plots_survive_any_numbers() -> None:
    for values in ([], [0.0], [1e-12, 1e3], [math.nan, 1.0], [5.0] * 4, [-1.0, 2.0]):
        points = [Point(i, v, f"p{i}") for i, v in enumerate(values)]
        for drawn in (
            dots({"a": points, "b": points}, x_title="x", y_title="y", show=number),
            lines({"a": points}, x_title="x", y_title="y", show=number, log=True),
            lines({"a": points}, x_title="x", y_title="y", show=size),
            columns({"a": points}, x_title="x", y_title="y", show=duration),
        ):
            Page(drawn)
            assert "nan" not in drawn and "inf" not in drawn


def test_points_lie_where_their_values_say() -> None:
    drawn = dots(
        {"a": [Point(0, 0.01, "low"), Point(1, 1.0, "high"), Point(2, 0.1, "middle")]},
        x_title="x",
        y_title="y",
        show=number,
    )
    wide = drawn[drawn.index('class="wide"') :]
    heights = [float(y) for y in re.findall(r'<circle[^>]* cy="([\d.]+)"', wide)]
    low, high, middle = heights
    assert low > middle > high and middle == pytest.approx((low + high) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(None), MISSING),
        (number(0.0), "0"),
        (number(61.2345), "61.23"),
        (number(0.00031234), "0.000312"),
        (number(0.000031234), "3.12e-5"),
        (number(123456.0), "123,456"),
        (relative_error(0.009157), "9.16e-3"),
        (relative_error(1.0), "1.00e0"),
        (relative_error(0.0), "0"),
        (share(0.8123), "81.23%"),
        (size(112_034_120), "112 MB"),
        (size(999), "999 B"),
        (duration(0.0123), "12.3 ms"),
        (duration(61.23), "61.2 s"),
        (duration(3725), "1 h 2 min"),
        (duration(150), "2 min 30 s"),
        (factor(3, 2), f"1.50{TIMES}"),
        (factor(3, 0), MISSING),
        (counted(1, "warning"), "1 warning"),
        (counted(2, "warning"), "2 warnings"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected


def test_values_close_together_fill_a_logarithmic_axis() -> None:
    near = {"error": [Point(0, 0.0105, "a"), Point(1, 0.0118, "b")]}
    drawn = dots(near, x_title="block", y_title="error", show=str)
    assert ">0.02<" in drawn and ">0.1<" not in drawn
    far = {"error": [Point(0, 1e-4, "a"), Point(1, 0.9, "b")]}
    drawn = dots(far, x_title="block", y_title="error", show=str)
    assert ">1.0<" in drawn and ">0.5<" not in drawn


def test_a_run_is_shown_beside_rounding_to_nearest() -> None:
    blocks = [
        {"block": f"model.layers.{i}", "error": error, "nearest": nearest}
        for i, (error, nearest) in enumerate([(0.05, 0.1), (0.09, 0.1), (0.12, 0.1)])
    ]
    data = report().to_json()
    data["verify"] = {**data["verify"], "blocks": blocks}
    page = render(data)
    assert "is 0.87 ± 0.20 times as far" in page and "2 of 3 are nearer" in page
    assert "</i>rounding to nearest</span>" in page
    data["verify"]["blocks"] = []
    assert "rounding to nearest</span>" not in render(data)


def peer(name: str, bits: float, kl: float) -> Peer:
    return Peer(name=name, bits=bits, kl={"value": kl, "error": 0.002})


MIXES = Mixes(
    measure="the squared change",
    best=((2.5, 16.0), (4.5, 2.0)),
    alike={"4 bits": (4.5, 2.25)},
    this=(3.5, 5.0),
)


def test_a_run_is_shown_by_size_beside_what_else_was_measured() -> None:
    others = (peer("w3", 3.5, 0.0512), peer("w4<b>", 4.25, 0.01))
    page = render(report(peers=others, mixes=MIXES).to_json())
    Page(page)
    assert "2 other checkpoints of this model" in page
    assert "nearer to the original: w3." in page, "the run has 4 bits and KL 0.0912"
    assert "w3: 3.50 bits, KL 0.0512 ± 0.0020 nats" in page and "w4<b>" not in page
    assert "best mix: 2.50 bits, error 16" in page and "4 bits: 4.50 bits, error 2.25" in page
    assert "this checkpoint: 3.50 bits" in page
    best = render(report(peers=(peer("w3", 3.5, 0.3), peer("w8", 8.1, 0.001))).to_json())
    assert "none of them is as small and nearer" in best
    assert "Quality by size" not in render(report().to_json())


def test_every_plot_has_a_legend_and_units_and_labels_apart() -> None:
    page = render(report(peers=(peer("w3", 3.5, 0.3),), mixes=MIXES).to_json())
    assert page.count("<figure>") == page.count('<div class="legend">') > 0
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page):
        assert re.search(r"no unit|bytes|time|nats", caption), caption
    points = [Point(x, 1.0 + x, "") for x in (4.0, 4.01, 4.02, 9.0)]
    drawn = lines({"a": points}, x_title="bits", y_title="KL, nats", show=number)
    assert ">4<" in drawn and ">4.01<" not in drawn and ">9<" in drawn


def test_an_expert_has_a_line_with_median_and_fewest() -> None:
    """Over blocks, whatever number of its linears tells of the tokens."""
    counts = {"layers.0": (6, 0), "layers.1": (2, 5), "layers.2": (9, 1)}
    units = [
        {
            "name": name,
            "rows": [
                {"linear": f"{name}.{expert}.{part}", "expert": expert, "routed": tokens}
                for expert, tokens in enumerate(seen)
                for part in ("up", "down")
            ],
        }
        for name, seen in counts.items()
    ]
    text = re.sub(r"<wbr>", "", experts(units))
    joined = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "expert tokens median of blocks fewest in blocks without any" in joined
    assert "0 17 6 2 layers.1 0" in joined and "1 6 1 0 layers.0 1" in joined
