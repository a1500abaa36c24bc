"""Ways to round a model such as SmolLM2 against rounding to nearest, on every kind of text.

    python scripts/anchor_texts.py TEXTS
    python scripts/measure/run.py rounding SMOLLM2 TEXTS --device cuda --json rounding.json

Calibration: 128 rows of 512 tokens of State of the Union addresses from 1940 on. Held out: 24 rows
of 512 of Moby-Dick and of the topics of Python's help, and 64 of each kind of the bundled held-out
texts. Ratios are to `rtn` on the same grid. AutoRound itself, llm-compressor and
GPTQModel run on the same rows, where their packages are installed.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from compressor_calibration.bundled import KINDS
from peers import run_autoround, run_gptqmodel, run_llm_compressor
from variant import Bench, Variant

from recipes import Recipes, text_options

ANCHORS, ANCHOR_WINDOWS = ("moby", "pydoc"), 24
GRIDS: dict[str, dict[str, Any]] = {
    "w4-asymmetric": {"bits": 4, "group_size": 64, "symmetric": False},
    "w4-symmetric": {"bits": 4, "group_size": 64},
    "w3-asymmetric": {"bits": 3, "group_size": 64, "symmetric": False},
    "w3-symmetric": {"bits": 3, "group_size": 64},
    "w2-asymmetric": {"bits": 2, "group_size": 64, "symmetric": False},
    "w2-symmetric": {"bits": 2, "group_size": 64},
    "w8-symmetric": {"bits": 8, "group_size": 64},
    "w3-g32": {"bits": 3, "group_size": 32},
    "w4-g32": {"bits": 4, "group_size": 32},
    "w4-channel": {"bits": 4, "group_size": None},
    "nvfp4": {"grid": "nvfp4"},
    "mxfp4": {"grid": "mxfp4"},
    "w4a8": {"bits": 4, "group_size": 64, "activations": "token"},
    "w8a8": {"bits": 8, "group_size": None, "activations": "token"},
}
PUBLISHED = {"scales": "range", "damping": 0.01, "correction": 0.0}
UNCORRECTED = {"correction": 0.0}
PEERS: dict[str, partial[None]] = {
    "autoround": partial(run_autoround, steps=200),
    "autoround 50": partial(run_autoround, steps=50),
    "autoround 1000": partial(run_autoround, steps=1000),
    "llm-compressor gptq": partial(run_llm_compressor, method="gptq"),
    "llm-compressor awq": partial(run_llm_compressor, method="awq"),
    "gptqmodel gptq": partial(run_gptqmodel, method="gptq"),
    "gptqmodel awq": partial(run_gptqmodel, method="awq"),
}
"""Other programs."""
HEAD = {"targets": "lm_head", "ignore": [], "group_size": 64}
METHODS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    # Parameters of each pass; the last one gets the grid as well.
    "rtn": [("rtn", {})],
    "rtn, head in 8 bits": [("rtn", {**HEAD, "bits": 8}), ("rtn", {})],
    "rtn, head in 4 bits": [("rtn", {**HEAD, "bits": 4}), ("rtn", {})],
    "rtn, cache in fp8": [("kv_cache", {"element": "fp8"}), ("rtn", {})],
    "rtn, cache in int8": [("kv_cache", {"element": "int8"}), ("rtn", {})],
    "gptq": [("gptq", {})],
    "gptq as published": [("gptq", PUBLISHED)],
    "gptq uncorrected": [("gptq", UNCORRECTED)],
    "gptq, damping .3": [("gptq", {"damping": 0.3})],
    "signround": [("signround", {})],
    "reconstruct fast": [("reconstruct", {"preset": "fast"})],
    "reconstruct good": [("reconstruct", {"preset": "good"})],
    "reconstruct fast, damping .3": [("reconstruct", {"preset": "fast", "damping": 0.3})],
    "reconstruct fast, damping 1": [("reconstruct", {"preset": "fast", "damping": 1.0})],
    "reconstruct good, damping .3": [("reconstruct", {"preset": "good", "damping": 0.3})],
    "awq": [("awq", {})],
    "awq + gptq": [("awq", {}), ("gptq", {})],
    "rotate": [("rotate", {}), ("rtn", {})],
    "rotate + gptq": [("rotate", {}), ("gptq", {})],
    "rotate + reconstruct fast": [("rotate", {}), ("reconstruct", {"preset": "fast"})],
    "rotate + reconstruct fast, damping .3": [
        ("rotate", {}),
        ("reconstruct", {"preset": "fast", "damping": 0.3}),
    ],
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, GGUF file or Hub id")
    parser.add_argument("texts", type=Path, help="what anchor_texts.py makes")
    parser.add_argument("--grids", nargs="*", choices=GRIDS, default=list(GRIDS)[:3])
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, *PEERS], default=list(METHODS))
    text_options(parser, calibration="", windows=64)


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    options.calibration = options.calibration or str(options.texts / "speeches.txt")
    anchors = min(ANCHOR_WINDOWS, options.windows)
    texts = {name: (str(options.texts / f"{name}.txt"), anchors) for name in ANCHORS}
    texts |= {kind: (f"bundled/{kind}", options.windows) for kind in KINDS}
    recipes = Recipes(bench, options.model, texts)
    yield recipes.itself("original")
    for grid in options.grids:
        for method in options.methods:
            baseline = f"{grid}: rtn"
            if method in PEERS:
                settings = {"grid": GRIDS[grid], **PEERS[method].keywords}
                make = partial(PEERS[method], recipes.model, grid=GRIDS[grid], device=bench.device)
                name = f"{grid}: {method}"
                yield recipes.foreign(name, make, baseline=baseline, settings=settings)
                continue
            *transforms, (last, more) = METHODS[method]
            passes = [{name: given} for name, given in transforms]
            passes.append(on_grid(last, more, GRIDS[grid]))
            untie = method.startswith("rotate") or "head" in method
            yield recipes.variant(f"{grid}: {method}", passes, baseline=baseline, untie=untie)


def on_grid(name: str, more: dict[str, Any], grid: dict[str, Any]) -> dict[str, Any]:
    """A pass that rounds on a grid; floats have one each for nearest codes."""
    return {grid["grid"]: {}} if name == "rtn" and "grid" in grid else {name: {**grid, **more}}
