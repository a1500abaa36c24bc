"""Measure variants of one thing on a model, and print a Markdown table with standard errors.

    python scripts/measure/run.py NAME --help
    python scripts/measure/run.py passes SMOLLM2 --json rows.json

A measurement is a file in `kinds/`, whose docstring is what --help says: `options(parser)` adds its
own and may set defaults, `variants(bench)` yields the rows. A row's failure leaves the others; with
--json, rows that the file already holds for the same settings are not measured again. A ratio is
that of perplexities and a standard error one of paired differences over windows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from variant import Bench, Figures, Variant
from windows import estimate

from compressor.errors import CompressError, Problems
from compressor.run.session import choose_device

NAMES = sorted(path.stem for path in (Path(__file__).parent / "kinds").glob("[!_]*.py"))
RUNNER = ("json", "only", "seconds", "batch", "device")
"""Options that no figure follows from."""


def shown(row: Figures, baseline: Figures | None) -> Iterator[tuple[str, str]]:
    """Column → cell."""
    baseline = baseline or {}
    for key, value in row.items():
        if isinstance(value, list):
            mean, error = estimate(value)
            if key.partition(" ")[0] == "nll":
                kind = key.removeprefix("nll").strip()
                yield f"perplexity {kind}".strip(), f"{math.exp(min(mean, 700)):.3f}"
                if key in baseline:
                    gaps = [a - b for a, b in zip(value, baseline[key], strict=True)]
                    gap, error = estimate(gaps)
                    cell = f"{math.exp(gap):.4f} ± {math.exp(gap) * error:.4f}"
                    yield f"ratio {kind}".strip(), cell
            else:
                yield key, f"{mean:.4f} ± {error:.4f}"
        elif isinstance(value, float):
            yield key, f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        else:
            yield key, str(value)


def table(rows: dict[str, Figures], baselines: dict[str, str]) -> Iterator[str]:
    """Markdown."""
    cells = {
        name: dict(shown(row, rows.get(baselines.get(name, ""))))
        for name, row in rows.items()
        if "failed" not in row
    }
    longest = sorted(cells.values(), key=len, reverse=True)
    columns = list(dict.fromkeys(column for row in longest for column in row))
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in cells.items():
        yield f"| {name} | {' | '.join(row.get(column, '') for column in columns)} |"
    yield from (f"\n{name}: {row['failed']}" for name, row in rows.items() if "failed" in row)


def measured(variant: Variant) -> Figures:
    """Its figures, or why it has none."""
    try:
        return variant.measure()
    except Problems as error:
        return {"failed": error.problems[0].message}
    except CompressError as error:
        return {"failed": error.message}
    except RuntimeError as error:  # one row's failure is no reason to lose the others
        traceback.print_exc()
        return {"failed": str(error).splitlines()[0]}


def plain(settings: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(settings, default=str))


def parser_of(name: str) -> tuple[Any, argparse.ArgumentParser]:
    """A measurement and its options, with those that all have."""
    module = importlib.import_module(f"kinds.{name}")
    parser = argparse.ArgumentParser(
        prog=f"run.py {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names hold one of these")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=8, help="rows of tokens at a time")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after this")
    parser.add_argument("--json", type=Path, help="rows are kept here, and resumed from")
    module.options(parser)
    return module, parser


def run(name: str, arguments: list[str]) -> None:
    """One measurement."""
    module, parser = parser_of(name)
    options = parser.parse_args(arguments)
    device, began = choose_device(options.device), time.perf_counter()
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    settings = plain({k: v for k, v in vars(options).items() if k not in RUNNER})
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    old = kept.get("rows", {}) if kept.get("settings") == settings else {}
    rows: dict[str, Figures] = {}
    baselines: dict[str, str] = {}
    print(about, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for variant in module.variants(Bench(options, device, Path(folder))):
            if options.only and not any(part in variant.name for part in options.only):
                continue
            follows = plain(variant.settings)
            baselines[variant.name] = variant.baseline
            known = old.get(variant.name, {})
            if known and "failed" not in known["figures"] and known["settings"] == follows:
                rows[variant.name] = known["figures"]
                continue
            if time.perf_counter() - began > options.seconds:
                print(f"{variant.name} not begun: run again to continue", flush=True)
                continue
            rows[variant.name] = figures = measured(variant)
            old[variant.name] = {"figures": figures, "settings": follows}
            baseline = rows.get(variant.baseline)
            says = figures.get("failed") or dict(shown(figures, baseline))
            print(f"{variant.name}: {says}", flush=True)
            if options.json:
                data = {"about": about, "settings": settings, "rows": old}
                options.json.write_text(json.dumps(data, indent=1))
    print("", *table(rows, baselines), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES)
    run(parser.parse_args(sys.argv[1:2]).name, sys.argv[2:])


if __name__ == "__main__":
    main()
