"""Writes docs/quality.md, what rounding costs by method and bits, from docs/quality.json.

    python scripts/quality_page.py                     write the page
    python scripts/quality_page.py --check             exit code 1 if it is out of date
    python scripts/quality_page.py --add ROWS.json     take rows from what scripts/measure/run.py
                                                       rounding wrote with --json
    python scripts/quality_page.py --drop WORDS        leave out rows whose method has these words

Rows are kept with a figure for each window of held-out text, so that differences have paired
standard errors. A row that is measured again replaces the old one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "measure"))
from windows import estimate

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITTEN = "<!-- Written by scripts/quality_page.py from quality.json; change those instead. -->"
KINDS = {
    "moby": "Moby-Dick",
    "pydoc": "Python's reference",
    "prose": "speeches",
    "technical": "technical",
    "code": "code",
    "dialogue": "dialogue",
    "spanish": "Spanish",
}
BASELINES = ("rtn", "signround", "autoround", "integers")
"""What other rows of a grid are held against."""
SAME = {"moby": "fiction"}
"""Kinds whose windows are those of a bundled kind."""
MAIN = ("smol", "smollm2-135m")
"""Folders of the model that the page is about; those of others are their names."""
FIRST_PARTS = ("awq", "rotate")
"""What rows of passes that begin with them are held against."""
OTHERS = ("llm-compressor", "gptqmodel")
"""Other programs: their rows are held against ours of the same method."""
OURS = ("gptq", "awq")
Row = Mapping[str, Any]


def add(data: dict[str, Any], path: Path) -> None:
    """Take the rows of one measurement."""
    found = json.loads(path.read_text("utf-8"))
    source = str(found["settings"]["calibration"])
    calibration = "mixture" if source == "bundled" else "speeches"
    folder = Path(str(found["settings"].get("model", MAIN[0]))).name
    model = "" if folder in MAIN else folder
    rows = {_key(r): r for r in data["rows"]}
    for name, entry in found["rows"].items():
        figures = entry["figures"]
        if "failed" in figures:
            continue
        grid, _, method = name.rpartition(": ")
        kept: dict[str, Any] = {
            **({"model": model} if model else {}),
            "grid": grid,
            "method": method,
            "calibration": "" if method == "original" or _rounds(method) else calibration,
            "top1": round(figures["top1"], 4),
        }
        for key in ("MB", "seconds"):
            if key in figures:
                kept[key] = round(figures[key], 1)
        for kind in KINDS:
            for what in ("nll", "kl"):
                values = figures.get(
                    f"{what} {SAME.get(kind, kind)}", figures.get(f"{what} {kind}")
                )
                if values is not None:
                    kept[f"{what} {kind}"] = [round(v, 5) for v in values]
        # Of the original, a measurement may have other kinds of text than another.
        rows[_key(kept)] = {**rows.get(_key(kept), {}), **kept} if method == "original" else kept
    data["rows"] = [rows[key] for key in sorted(rows)]


def _rounds(method: str) -> bool:
    """Whether it is `rtn`, of a head or a cache, too: it reads no text."""
    return method.split(",")[0] == "rtn"


def _follows(method: str, ours: str) -> bool:
    """Whether it begins with a pass of ours, or is another program's of the same name."""
    begins = ours in FIRST_PARTS and method.startswith(f"{ours} + ")
    return begins or (ours in OURS and method in {f"{other} {ours}" for other in OTHERS})


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.get("model", ""), row["grid"], row["method"], row["calibration"]


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
    rows: list[Row] = data["rows"]
    parts = [WRITTEN, "", "# What rounding costs", "", *data["about"], ""]
    for model in ("", *sorted({r["model"] for r in rows if "model" in r})):
        there = [r for r in rows if r.get("model", "") == model]
        originals = [r for r in there if r["method"] == "original"]
        for grid, label in data["grids"].items():
            own = [r for r in there if r["grid"] == grid]
            if not own:
                continue
            own.sort(key=lambda r: (r["calibration"], -r["top1"]))
            title = f"Small {model}: {label}" if model else label
            parts += [f"## {title}", "", *table([*originals, *own]), ""]
            parts += [*claims(own), ""]
    return "\n".join(parts).rstrip() + "\n"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Perplexities, the mean KL over kinds, agreement, bytes and time."""
    yield f"| | calibrated on | {' | '.join(KINDS.values())} | KL | top-1 | MB | seconds |"
    yield "|---" * (len(KINDS) + 6) + "|"
    for row in rows:
        cells = [_perplexity(row, kind) for kind in KINDS]
        divergences = [estimate(row[f"kl {kind}"])[0] for kind in KINDS if f"kl {kind}" in row]
        kl = f"{sum(divergences) / len(divergences):.4f}" if divergences else ""
        about = [kl, f"{row['top1']:.3f}", f"{row.get('MB', '')}", f"{row.get('seconds', '')}"]
        yield f"| {_name(row)} | {row['calibration']} | {' | '.join([*cells, *about])} |"


def claims(rows: Sequence[Row]) -> Iterator[str]:
    """Each method against what came before it, kind by kind, where a difference is more than two
    paired standard errors."""
    for baseline in (*BASELINES, *dict.fromkeys((*FIRST_PARTS, *OURS))):
        for row in rows:
            if baseline not in BASELINES and not _follows(row["method"], baseline):
                continue
            bases = [
                r
                for r in rows
                if r["method"] == baseline and r["calibration"] in ("", row["calibration"])
            ]
            if not bases or row["method"] in ("rtn", baseline):
                continue
            if _rounds(row["method"]) and baseline != "rtn":
                continue
            found: dict[str, list[str]] = {"better": [], "worse": [], "level": []}
            for kind, label in KINDS.items():
                difference = gap(row, bases[0], kind)
                if difference is not None:
                    mean, error = difference
                    level = not abs(mean) >= 2 * error
                    verdict = "level" if level else "better" if mean < 0 else "worse"
                    found[verdict].append(f"{label} {mean:+.3f} ± {error:.3f}")
            says = "; ".join(f"{k} on {', '.join(v)}" for k, v in found.items() if v)
            if says:
                whole, divergence = (gap(row, bases[0], *KINDS, what=w) for w in ("nll", "kl"))
                for label, difference in (("in all", whole), ("KL", divergence)):
                    if difference is not None:
                        says += f"; {label} {difference[0]:+.4f} ± {difference[1]:.4f}"
                trained = f", calibrated on the {row['calibration']}" if row["calibration"] else ""
                yield f"- {_name(row)}{trained}, against `{baseline}` (nats): {says}."


def _name(row: Row) -> str:
    return "original" if row["method"] == "original" else f"`{row['method']}`"


def _perplexity(row: Row, kind: str) -> str:
    values = row.get(f"nll {kind}")
    if not values:
        return ""
    value = math.exp(estimate(values)[0])
    return f"{value:.2f}" if value < 10_000 else f"{value:.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--add", nargs="*", type=Path, default=[])
    parser.add_argument("--drop", nargs="*", default=[])
    options = parser.parse_args()
    store, written = DOCS / "quality.json", DOCS / "quality.md"
    data = json.loads(store.read_text("utf-8"))
    for path in options.add:
        add(data, path)
    data["rows"] = [r for r in data["rows"] if not any(w in r["method"] for w in options.drop)]
    if options.add or options.drop:
        head = {k: v for k, v in data.items() if k != "rows"}
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in data["rows"])
        text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
        store.write_text(f'{text},\n "rows": [\n{lines}\n ]\n}}\n', "utf-8")
    made = page(data)
    if options.check:
        return int(written.read_text("utf-8") != made)
    written.write_text(made, "utf-8")
    print(f"written: {written.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
