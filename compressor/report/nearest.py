"""What blocks compute, beside the original rounded to nearest at the same bits."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.report.elements import section
from compressor.report.svg import Point, lines
from compressor.report.text import number, relative_error, with_error


def beside_nearest(verify: Mapping[str, Any] | None) -> str:
    """A section from a verdict's plain data; empty where nothing was held against an original."""
    blocks = (verify or {}).get("blocks") or []
    if not blocks:
        return ""
    ratios = [row["error"] / row["nearest"] for row in blocks if row["nearest"]]
    better = sum(ratio < 1 for ratio in ratios)
    says = (
        f"<p>A block of this checkpoint is {with_error(_mean(ratios))} times as far from the "
        f"original's output as rounding to nearest leaves it (mean over blocks; {better} of "
        f"{len(ratios)} are nearer).</p>"
        if ratios
        else ""
    )
    series = {
        title: [
            Point(i, row[key], f"{row['block']}: {relative_error(row[key])}")
            for i, row in enumerate(blocks)
        ]
        for key, title in (("error", "this checkpoint"), ("nearest", "rounding to nearest"))
    }
    plot = lines(
        series,
        x_title="block, by number",
        y_title="error of what a block adds to the original's own states on held-out text, "
        "relative (no unit)",
        show=number,
    )
    about = (
        "Both have the same bits, scales and exact rescalings or rotations; only which values were "
        "chosen differs."
    )
    return section("Beside rounding to nearest", f'{says}{plot}<p class="quiet">{about}</p>')


def _mean(values: Sequence[float]) -> dict[str, float]:
    """The mean with its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"value": statistics.fmean(values), "error": error}
