"""Calibration windows whose context decides their loss, against random ones at equal tokens.

    python scripts/measure/run.py sufficiency SMOLLM2 --device cuda --json sufficiency.json

Each method is calibrated on random windows of several seeds, and on as many that were selected
among four times as many, of the same text and seeds. Held out: other text of two kinds.
`least` is what a window has to hold of what twice as long a context says.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from variant import Bench, Variant

from recipes import Recipes, text_options

METHODS: dict[str, list[Any]] = {
    "awq": [{"awq": {}}, {"rtn": {"bits": 4, "group_size": 64, "symmetric": False}}],
    "awq w3": [{"awq": {}}, {"rtn": {"bits": 3, "group_size": 64, "symmetric": False}}],
    "gptq": [{"gptq": {"bits": 4, "group_size": 64}}],
    "gptq w3": [{"gptq": {"bits": 3, "group_size": 64}}],
}
SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, Any] | None] = {
    "random": None,
    "selected": {"sufficiency": {}},
    "selected, least 0": {"sufficiency": {"min": 0.0}},
}
CLAIMS = [
    (f"{method}: {way} {seed}", f"{method}: random {seed}")
    for method in METHODS
    for way in list(WAYS)[1:]
    for seed in SEEDS
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, GGUF file or Hub id")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--group-size", type=int, default=64, help="of every method")
    text_options(parser, samples=32, length=512, windows=48)


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    texts = {kind: (f"bundled/{kind}", options.windows) for kind in ("prose", "code")}
    recipes = Recipes(bench, options.model, texts)
    yield recipes.itself("original")
    for method in options.methods:
        passes = [sized(entry, options.group_size) for entry in METHODS[method]]
        for seed in options.seeds:
            for way in options.ways:
                chosen = WAYS[way]
                yield recipes.variant(
                    f"{method}: {way} {seed}",
                    passes,
                    baseline=f"{method}: random {seed}",
                    seed=seed,
                    calibration={} if chosen is None else {"select": chosen},
                    verify=False,
                )


def sized(entry: dict[str, Any], group_size: int) -> dict[str, Any]:
    """A pass with groups of that size."""
    ((name, params),) = entry.items()
    return {name: {**params, "group_size": group_size} if params else params}
