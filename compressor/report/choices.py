"""The report's part on chosen key blocks: how much of the teacher's choice each scorer finds."""

from collections.abc import Mapping
from html import escape
from typing import Any

from compressor.attention.rule import rule_class, rule_names
from compressor.report.svg import Point, lines
from compressor.report.text import share


def choices(record: Mapping[str, Any]) -> str:
    """Plots of a record of forecasts (`ChoiceRecord.to_json`), and its means."""
    selection = record["selection"]
    drawn = []
    for key, title in (
        ("recall", "share of the teacher's blocks that are found"),
        ("mass", "share of attention in what is chosen"),
    ):
        series = {
            _title(scorer): [
                Point(q["layer"], q[key], f"{scorer}, layer {q['layer']}: {share(q[key])}")
                for q in record["layers"]
                if q["scorer"] == scorer
            ]
            for scorer in record["means"]
        }
        drawn.append(lines(series, x_title="layer", y_title=title, show=share))
    means = ", ".join(
        f"{escape(_title(scorer))} {share(found['recall'])} ({share(found['mass'])} of attention)"
        for scorer, found in record["means"].items()
    )
    return (
        f'<p class="quiet">{selection["top_k"]} blocks of {selection["block_size"]} keys, measured '
        f"on {record['rows']} held-out rows of {record['length']:,} tokens, where queries had more "
        f"blocks than that. Mean over layers: {means}.</p>{''.join(drawn)}"
    )


def _title(scorer: str) -> str:
    """A rule's title, or what a scorer that is no rule says of itself."""
    if scorer not in rule_names():
        return f"most {scorer} blocks"
    return rule_class(scorer).title or scorer
