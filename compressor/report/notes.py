"""What the rows of a run's passes say beside errors, in a line for each kind."""

from collections.abc import Iterable, Mapping
from typing import Any


def row_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Notes of all layers: alike ones of a pass are one line, and what they count (`noted`) is
    summed."""
    layers: dict[tuple[str, str], int] = {}
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if "note" in row:
            key = (str(row.get("pass", "")), str(row["note"]))
            layers[key] = layers.get(key, 0) + 1
            if "noted" in row:
                counts[key] = counts.get(key, 0) + int(row["noted"])
    return [
        f"{name}: {f'{counts[name, text]:,} ' if (name, text) in counts else ''}{text}, in "
        f"{number} {'layer' if number == 1 else 'layers'}"
        for (name, text), number in layers.items()
    ]


def kept_rows(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """For each pass that corrects rounding, how many outputs keep the nearest codes."""
    sums: dict[str, list[int]] = {}
    for row in rows:
        if "rows_kept_nearest" in row:
            found = sums.setdefault(str(row.get("pass", "")), [0, 0])
            found[0] += int(row["rows_kept_nearest"])
            found[1] += int(row["rows"])
    return [
        f"{name}: {kept:,} of {every:,} outputs keep the codes of rounding to nearest, whose error "
        "was no larger"
        for name, (kept, every) in sums.items()
    ]
