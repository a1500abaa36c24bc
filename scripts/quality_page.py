"""Writes docs/quality.md, what rounding costs by method and bits, from docs/quality.json.

    python scripts/quality_page.py                     write the page
    python scripts/quality_page.py --add ROWS.json     take rows of scripts/measure/run.py --json

Rows are kept with a figure for each window of held-out text, so that differences have paired
standard errors. A row that is measured again replaces the old one.
"""

import json
import math
import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import markdown

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITTEN = "<!-- Written by scripts/quality_page.py from quality.json; change those instead. -->"
KINDS = {
    "fiction": "Moby-Dick",
    "pydoc": "Python's reference",
    "prose": "speeches",
    "technical": "technical",
    "code": "code",
    "dialogue": "dialogue",
    "spanish": "Spanish",
}
BASELINES = ("rtn", "signround", "autoround", "integers")
"""What all rows of a grid are held against."""
NAMESAKES = ("awq", "rotate", "gptq")
"""What rows are held against that begin with it, or are another program's of that name."""
OTHERS = ("llm-compressor", "gptqmodel")
"""Other programs."""
Row = Mapping[str, Any]


def key(row: Row) -> tuple[str, str, str, str]:
    """What no other row has."""
    return row.get("model", ""), row["grid"], row["method"], row["calibration"]


def joined(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows with new ones in place of old ones; an original keeps its other kinds of text."""
    kept = {key(row): row for row in rows}
    for row in new:
        old = kept.get(key(row), {}) if row["method"] == "original" else {}
        kept[key(row)] = {**old, **row}
    return [kept[name] for name in sorted(kept)]


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread / math.sqrt(len(values))


def gap(row: Row, other: Row, *kinds: str, what: str = "nll") -> tuple[float, float] | None:
    """By how many nats a row is worse than another on the same windows of these kinds."""
    found: list[float] = []
    for kind in kinds:
        a, b = row.get(f"{what} {kind}"), other.get(f"{what} {kind}")
        if a and b and len(a) == len(b):
            found += [x - y for x, y in zip(a, b, strict=True)]
    return estimate(found) if found else None


def page(data: Mapping[str, Any]) -> str:
    """The page."""
    parts = [WRITTEN, "", "# What rounding costs", "", *data["about"], ""]
    return "\n".join([*parts, *sections(data["rows"], data["grids"])]).rstrip() + "\n"


def sections(rows: Sequence[Row], grids: Mapping[str, str]) -> Iterator[str]:
    """A table, and what follows from it, for each model and grid."""
    for model in sorted({row.get("model", "") for row in rows}):
        there = [r for r in rows if r.get("model", "") == model]
        originals = [r for r in there if r["method"] == "original"]
        for grid, label in grids.items():
            own = [r for r in there if r["grid"] == grid and r["method"] != "original"]
            if own:
                own.sort(key=lambda r: (r["calibration"], -r["top1"]))
                yield f"## Small {model}: {label}" if model else f"## {label}"
                yield from ("", table([*originals, *own]), "", *claims(own), "")


def table(rows: Sequence[Row]) -> str:
    """Perplexities, the mean KL over kinds, agreement, bytes and time."""
    kinds = [kind for kind in KINDS if any(f"nll {kind}" in row for row in rows)]
    head = ("", "calibrated on", *map(KINDS.get, kinds), "KL", "top-1", "MB", "seconds")
    lines = []
    for row in rows:
        cells = [perplexity(row.get(f"nll {kind}")) for kind in kinds]
        divergences = [estimate(row[f"kl {kind}"])[0] for kind in kinds if f"kl {kind}" in row]
        cells += [f"{statistics.fmean(divergences):.4f}" if divergences else ""]
        cells += [f"{row['top1']:.3f}", *(str(row.get(figure, "")) for figure in ("MB", "seconds"))]
        lines.append([name(row), row["calibration"], *cells])
    return markdown(head, lines)


def perplexity(losses: Sequence[float] | None) -> str:
    value = math.exp(min(estimate(losses)[0], 700)) if losses else math.nan
    return "" if not losses else f"{value:.2f}" if value < 10_000 else f"{value:.2g}"


def name(row: Row) -> str:
    return "original" if row["method"] == "original" else f"`{row['method']}`"


def held_against(method: str) -> set[str]:
    """Methods that a method of the same grid is compared with."""
    begins, _, then = method.partition(" + ")
    namesakes = {begins} if then else {method.removeprefix(f"{other} ") for other in OTHERS}
    plain = method.split(",")[0] == "rtn"  # of a head or a cache, too
    baselines = BASELINES[:1] if plain else BASELINES
    return {*baselines, *namesakes.intersection(NAMESAKES)} - {method}


def claims(rows: Sequence[Row]) -> Iterator[str]:
    """Each method against what came before it, kind by kind, where a difference is more than two
    paired standard errors."""
    for baseline in (*BASELINES, *NAMESAKES):
        bases = [row for row in rows if row["method"] == baseline]
        for row in rows:
            same = [base for base in bases if base["calibration"] in ("", row["calibration"])]
            if not same or baseline not in held_against(row["method"]):
                continue
            found: dict[str, list[str]] = {"better": [], "worse": [], "level": []}
            for kind, label in KINDS.items():
                if difference := gap(row, same[0], kind):
                    mean, error = difference
                    level = not abs(mean) >= 2 * error
                    verdict = "level" if level else "better" if mean < 0 else "worse"
                    found[verdict].append(f"{label} {mean:+.3f} ± {error:.3f}")
            says = [f"{verdict} on {', '.join(on)}" for verdict, on in found.items() if on]
            for label, what in (("in all", "nll"), ("KL", "kl")):
                if says and (difference := gap(row, same[0], *KINDS, what=what)):
                    says.append(f"{label} {difference[0]:+.4f} ± {difference[1]:.4f}")
            trained = f", calibrated on the {row['calibration']}" if row["calibration"] else ""
            if says:
                yield f"- {name(row)}{trained}, against `{baseline}` (nats): {'; '.join(says)}."


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="*", type=Path, default=[])
    store = DOCS / "quality.json"
    data = json.loads(store.read_text("utf-8"))
    if added := parser.parse_args().add:
        for path in added:
            data["rows"] = joined(data["rows"], json.loads(path.read_text("utf-8"))["rows"])
        store.write_text(stored(data), "utf-8")
    (DOCS / "quality.md").write_text(page(data), "utf-8")


def stored(data: Mapping[str, Any]) -> str:
    """JSON with a line for each row."""
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in data["rows"])
    head = {k: v for k, v in data.items() if k != "rows"}
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    return f'{text},\n "rows": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    main()
