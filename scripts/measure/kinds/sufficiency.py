"""Calibration windows whose context decides their loss, against random ones at equal tokens.

    python scripts/measure/run.py sufficiency SMOLLM2 --device cuda --json sufficiency.json

Each method is calibrated on random windows of several seeds, and on as many that were selected
among four times as many, of the same text and seeds. Held out: other text of two kinds.
`least` is what a window has to hold of what twice as long a context says.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from compressor_calibration.bundled import bundled_text
from variant import Bench, Figures, Variant

from compressor.checkpoint.source import open_source
from compressor.evaluate.passkey import Passkey, passkey
from compressor.runner.tokenizer import load_tokenizer
from recipes import Recipes, text_options

METHODS: dict[str, list[Any]] = {
    "awq": [{"awq": {}}, {"rtn": {"bits": 4, "group_size": 64, "symmetric": False}}],
    "awq w3": [{"awq": {}}, {"rtn": {"bits": 3, "group_size": 64, "symmetric": False}}],
    "gptq": [{"gptq": {"bits": 4, "group_size": 64}}],
    "gptq w3": [{"gptq": {"bits": 3, "group_size": 64}}],
    "blasst": [{"blasst": {"rows": 1, "keys": 16, "decode": None}}],
    "gates": [
        {
            "duo_attention": {
                "data": {
                    "keys": 4, "words": 4, "min_length": 384, "max_length": 768, "lengths": 8,
                    "prefix": "", "suffix": "", "separator": "",
                    "needle": "\n\nRemember this, the {ordinal} passkey is: {passkey}.\n\n",
                    "question": "\n\nWhat is the {ordinal} passkey? It is: {passkey}",
                },
                "sinks": 4, "window": 64, "num_steps": 80, "lr": 0.05, "share": 0.5,
            }
        }
    ],
}  # fmt: skip
UNROUNDED = ("blasst", "gates")
"""They change no weight: of them the report tells what was learned, and passkeys are asked for."""
LEARNED = ("wanted", "skipped on held-out text", "active_gates", "bimodality")
SEEDS = (0, 1, 2)
PASSKEY_DRAWS = 6
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
    parser.add_argument("--passkey-length", type=int, default=768, help="of methods of attention")
    parser.add_argument("--group-size", type=int, default=64, help="of every method")
    text_options(parser, samples=32, length=512, windows=48)


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    texts = {kind: (f"bundled/{kind}", options.windows) for kind in ("prose", "code")}
    recipes = Recipes(bench, options.model, texts)
    yield recipes.itself("original")
    for method in options.methods:
        passes = METHODS[method]
        if method not in UNROUNDED:
            passes = [sized(entry, options.group_size) for entry in passes]
        for seed in options.seeds:
            for way in options.ways:
                chosen = WAYS[way]
                row = recipes.variant(
                    f"{method}: {way} {seed}",
                    passes,
                    baseline=f"{method}: random {seed}",
                    learned=LEARNED,
                    seed=seed,
                    calibration={} if chosen is None else {"select": chosen},
                    verify=False,
                    **({"format": "dense"} if method in UNROUNDED else {}),
                )
                yield retrieving(row, bench) if method in UNROUNDED else row


def retrieving(row: Variant, bench: Bench) -> Variant:
    """The same with the share of passkeys' tokens that what it wrote misses in held-out text, for
    each of several draws."""

    def measure() -> Figures:
        found = row.measure()
        source = open_source(bench.work / "out")
        missed = [
            1
            - passkey(
                source,
                load_tokenizer(source.checkpoint.folder),
                haystack=bundled_text("held_out", "prose"),
                task=Passkey(lengths=(bench.options.passkey_length,), rows=2, seed=seed),
                device=bench.device,
                dtype=torch.float32,
                batch=bench.options.batch,
            ).accuracy.value
            for seed in range(PASSKEY_DRAWS)
        ]
        return {**found, "missed": missed}

    return replace(row, measure=measure)


def sized(entry: dict[str, Any], group_size: int) -> dict[str, Any]:
    """A pass with groups of that size."""
    ((name, params),) = entry.items()
    return {name: {**params, "group_size": group_size} if params else params}
