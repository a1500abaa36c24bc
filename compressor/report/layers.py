"""What units tell of their layers: errors, and the tokens that experts saw."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.report.elements import breakable, meter, section, table
from compressor.report.svg import Point, dots
from compressor.report.text import number, relative_error

WORST = 12
Units = Sequence[Mapping[str, Any]]


def layers(units: Units) -> str:
    """Errors of linears by block, and the largest; empty where none is known."""
    errors = _linear_errors(units)
    if not errors:
        return ""
    by_leaf: dict[str, dict[int, list[tuple[float, str]]]] = {}
    for name, (error, _) in errors.items():
        place = re.search(r"\.(\d+)\.", name)
        if place:
            leaf = by_leaf.setdefault(name.rpartition(".")[2], {})
            leaf.setdefault(int(place[1]), []).append((error, name))
    series = {
        leaf: [_mean_point(i, found) for i, found in rows.items()] for leaf, rows in by_leaf.items()
    }
    kinds = {kind for _, kind in errors.values()}
    title = "relative squared error of the " + " or ".join(sorted(kinds or {"output"}))
    title += " (no unit)"
    body = dots(series, x_title="block, by number", y_title=title, show=number) if series else ""
    worst = sorted(errors.items(), key=lambda entry: -entry[1][0])[:WORST]
    top = worst[0][1][0] or 1.0
    cells = ((name, relative_error(error), meter(error / top)) for name, (error, _) in worst)
    rows = [[breakable(name), *rest] for name, *rest in cells]
    largest = table(["linear", "error", ""], rows, numbers=(1,), names=(0,))
    return section("Error by layer", f"{body}<h3>Largest errors</h3>{largest}")


def experts(units: Units) -> str:
    """A line for each expert: the calibration tokens that routers sent it, over all blocks."""
    seen: dict[int, dict[str, int]] = {}
    for unit in units:
        for row in unit["rows"]:
            if "routed" in row:
                seen.setdefault(row["expert"], {})[unit["name"]] = row["routed"]
    rows = []
    for expert, found in sorted(seen.items()):
        least = min(found, key=lambda name: found[name])
        without = sum(not tokens for tokens in found.values())
        counts = (sum(found.values()), statistics.median(found.values()), found[least])
        numbers = [f"{count:,.10g}" for count in counts]
        rows.append([str(expert), *numbers, breakable(least), str(without)])
    header = ["expert", "tokens", "median of blocks", "fewest", "in", "blocks without any"]
    lines = table(header, rows, numbers=(1, 2, 3, 5), names=(4,))
    return section("Tokens seen by experts", lines) if rows else ""


def _linear_errors(units: Units) -> dict[str, tuple[float, str]]:
    """Linear → its error, and what that is an error of."""
    return {
        row["linear"]: (float(row["error"]), str(row.get("error_of", "output")))
        for unit in units
        for row in unit["rows"]
        if isinstance(row.get("linear"), str) and isinstance(row.get("error"), (int, float))
    }


def _mean_point(block: int, found: Sequence[tuple[float, str]]) -> Point:
    """One linear of a block, or the mean over its experts."""
    mean = sum(error for error, _ in found) / len(found)
    worst, name = max(found)
    label = f"{name}: {relative_error(worst)}"
    if len(found) > 1:
        label = f"mean of {len(found)}: {relative_error(mean)}; worst {label}"
    return Point(block, mean, label)
