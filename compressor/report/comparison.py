"""Checkpoints beside each other, as a page."""

import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from compressor.report.elements import breakable, page, section, table
from compressor.report.svg import Point, dots, lines
from compressor.report.text import (
    MISSING,
    number,
    relative_error,
    share_with_error,
    size,
    with_error,
)

WORST = 12

Side = Mapping[str, Any]
"""Plain data of `run.compare.Side`."""


def page_of(sides: Sequence[Side], *, text: str) -> str:
    """The page; `text` says on what was measured."""
    parts = [_header(sides), _figures(sides, text), _pareto(sides), _layers(sides)]
    parts += [_kernels(sides), _notes(sides)]
    return page("Comparison: " + ", ".join(side["name"] for side in sides), parts)


def figures(side: Side) -> dict[str, str]:
    """What a line of the table has of one checkpoint, by column."""
    found = side["evaluation"] or {}
    shown = {
        "size": size(side["nbytes"]),
        "bits": f"{side['bits_per_weight']:.2f}",
        "perplexity": with_error(found["perplexity"]) if found else MISSING,
    }
    for key, title in (("perplexity_ratio", "ratio"), ("kl", "KL, nats")):
        shown[title] = with_error(found[key]) if found.get(key) else MISSING
    shown["top-1"] = share_with_error(found["top1"]) if found.get("top1") else MISSING
    errors, whole = side["layers"].values(), whole_blocks(side)
    shown["weights"] = relative_error(statistics.median(errors)) if errors else MISSING
    shown["blocks"] = relative_error(statistics.median(whole.values())) if whole else MISSING
    return shown


def whole_blocks(side: Side) -> dict[str, float]:
    """Block → error of all that it adds to the stream."""
    rows = (row for row in side["blocks"] if row["what"] == "the block")
    return {row["block"]: row["error"] for row in rows}


def _header(sides: Sequence[Side]) -> str:
    names = " and ".join(side["name"] for side in sides)
    against = next((side["name"] for side in sides if side["reference"]), None)
    beside = f"compared with {against}" if against else "without a reference"
    return f'<header><h1>{escape(names)}</h1><p class="quiet">{escape(beside)}</p></header>'


def _figures(sides: Sequence[Side], text: str) -> str:
    header = ["", *figures(sides[0])]
    rows = [[breakable(side["name"]), *map(escape, figures(side).values())] for side in sides]
    about = (
        f"{text} Bits are of a parameter, scales included. Weights and blocks are medians of "
        "relative errors: \u2016weight \u2212 reference\u2019s\u2016 / \u2016reference\u2019s"
        "\u2016 of each linear, exact rescalings undone, and the same of what each block adds to "
        "the reference\u2019s own hidden states; \u00b1 is one standard error."
    )
    schemes = [
        [breakable(side["name"]), str(count), escape(scheme)]
        for side in sides
        for scheme, count in side["schemes"].items()
    ]
    return section(
        "Figures",
        table(header, rows, numbers=range(1, len(header)), names=(0,))
        + f'<p class="quiet after">{escape(about)}</p>',
    ) + section("Schemes", table(["", "linears", "stored as"], schemes, numbers=(1,), texts=(2,)))


def _pareto(sides: Sequence[Side]) -> str:
    """What each costs in quality for its size."""
    measured = [side for side in sides if (side["evaluation"] or {}).get("kl")]
    if len(measured) < 2:
        return ""
    series = {
        side["name"]: [
            Point(
                round(side["bits_per_weight"], 2),
                side["evaluation"]["kl"]["value"],
                f"{side['name']}: {side['bits_per_weight']:.2f} bits, "
                f"KL {with_error(side['evaluation']['kl'])} nats",
            )
        ]
        for side in measured
    }
    plot = dots(
        series,
        x_title="bits of a parameter, scales included",
        y_title="KL from the reference, in nats; lower left is better",
        show=number,
    )
    return section("Quality by size", plot)


def _layers(sides: Sequence[Side]) -> str:
    compared = [side for side in sides if side["layers"]]
    if not compared:
        return ""
    plots = ""
    for title, by_block in (
        ("error of what a block adds to the stream, relative (no unit)", whole_blocks),
        (
            "error of a block\u2019s weights, mean of its linears, relative (no unit)",
            _mean_weights,
        ),
    ):
        series = {
            side["name"]: [
                Point(i, error, f"{name}: {relative_error(error)}")
                for i, (name, error) in enumerate(by_block(side).items())
            ]
            for side in compared
        }
        if any(len(points) > 1 for points in series.values()):
            plots += lines(series, x_title="block, by number", y_title=title, show=number, log=True)
    names = list(dict.fromkeys(name for side in compared for name in side["layers"]))
    names.sort(key=lambda name: -max(side["layers"].get(name, 0.0) for side in compared))
    rows = [
        [
            breakable(name),
            *(relative_error(side["layers"][name]) if name in side["layers"] else MISSING
              for side in compared),
        ]
        for name in names[:WORST]
    ]  # fmt: skip
    header = ["linear", *(breakable(side["name"]) for side in compared)]
    worst = table(header, rows, numbers=range(1, len(header)), names=(0,))
    return section("Error by layer", f"{plots}<h3>Largest errors of weights</h3>{worst}")


def _mean_weights(side: Side) -> dict[str, float]:
    """Number of a block → mean error of its linears' weights."""
    found: dict[str, list[float]] = {}
    for name, error in side["layers"].items():
        if place := re.search(r"\.(\d+)\.", name):
            found.setdefault(f"block {place[1]}", []).append(error)
    return {block: statistics.fmean(errors) for block, errors in found.items()}


def kernel_rows(sides: Sequence[Side]) -> list[tuple[str, str, list[str]]]:
    """Checkpoint, tokens of an input, microseconds of each role of linears and of all."""
    roles = kernel_roles(sides)
    rows = []
    for side in sides:
        times = side["microseconds"]
        for tokens in next(iter(times.values()), {}):
            each = [times[role][tokens] if role in times else None for role in roles]
            whole = None if None in each else sum(x for x in each if x is not None)
            rows.append((side["name"], f"{tokens:,}", [number(x) for x in (*each, whole)]))
    return rows


def kernel_roles(sides: Sequence[Side]) -> list[str]:
    """Roles of linears that were timed."""
    return list(dict.fromkeys(role for side in sides for role in side["microseconds"]))


def _kernels(sides: Sequence[Side]) -> str:
    rows = [[breakable(name), tokens, *times] for name, tokens, times in kernel_rows(sides)]
    if not rows:
        return ""
    header = ["", "tokens", *map(escape, kernel_roles(sides)), "all"]
    about = (
        "Microseconds of the linears of one block in the middle, one of each role, by this "
        "project\u2019s kernels, rounding of inputs included; floats by PyTorch. A runtime has "
        "kernels of its own."
    )
    return section(
        "Kernels",
        table(header, rows, numbers=range(1, len(header)), names=(0,))
        + f'<p class="quiet after">{escape(about)}</p>',
    )


def _notes(sides: Sequence[Side]) -> str:
    notes = [[breakable(side["name"]), escape(note)] for side in sides for note in side["notes"]]
    return section("Beyond rounding", table([], notes, names=(0,), texts=(1,))) if notes else ""
