"""Mixed precision against one form everywhere, at the same number of bits.

    python scripts/measure/run.py allocation SMOLLM2 --device cuda --json allocation.json

What each group of linears costs is measured once for each kind of error (`change`: of the hidden
states after the block; `kl`: of the predictions), rounded by `--measured`, at each of `--bits` in
groups of each of `--groups` and in each of `--forms`; recipes of 3.5 and 4.5 bits follow from it.
Ratios are to integers in groups of 32 everywhere: 3.5 bits with 3, 4.5 with 4. With
`--sensitivities` what was measured is kept in a folder, and not measured again.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor_calibration.bundled import KINDS
from variant import Bench, Figures, Variant

from compressor.plan.recipe import make_recipe
from compressor.run.allocate import (
    Sensitivity,
    allocate,
    error_of,
    mixed_recipe,
    parse_sensitivity,
    uniform,
    with_quantizer,
)
from compressor.run.sensitivity import measure_sensitivity
from compressor.run.tokens import calibration_tokens
from compressor.runner.tokenizer import load_tokenizer
from recipes import Recipes, text_options

BUDGETS = {3.5: 3, 4.5: 4}
"""Bits of a weight, and the integers that take as many in groups of 32."""
GROUP = 32
CLAIMS = [
    (f"{budget} bits: mixed by kl", f"{budget} bits: {other}")
    for budget in BUDGETS
    for other in ("integers", "nvfp4", "mixed by change")
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, GGUF file or Hub id")
    parser.add_argument("--quantizer", default="gptq", help="of uniform and mixed recipes alike")
    parser.add_argument("--measured", default="rtn", help="rounds while sensitivities are measured")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--forms", nargs="*", default=["nvfp4", "mxfp4", "fp8"])
    parser.add_argument("--groups", type=int, nargs="*", default=[], help=f"{GROUP} alone if none")
    parser.add_argument("--sensitivities", type=Path, help="folder")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows of the measuring")
    parser.add_argument("--errors", nargs="*", default=["kl", "change"])
    text_options(parser, calibration="bundled", windows=24)


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    texts = {kind: (f"bundled/{kind}", options.windows) for kind in KINDS}
    recipes = Recipes(bench, options.model, texts)
    known: dict[str, Sensitivity] = {}
    yield recipes.itself("original")

    def sensitivity(error: str) -> Sensitivity:
        if error not in known:
            known[error] = _measured(bench, recipes, error)
        return known[error]

    def mixed(name: str, budget: float, error: str) -> Variant:
        def measure() -> Figures:
            started = time.perf_counter()
            found = with_quantizer(sensitivity(error), options.quantizer)
            took = time.perf_counter() - started
            choice = allocate(found, budget)
            passes = mixed_recipe(found, choice)["passes"]
            row = recipes.variant(name, passes, baseline="", format="compressed-tensors").measure()
            labels = [g.options[i].label for g, i in zip(found.groups, choice, strict=True)]
            counts = {label: labels.count(label) for label in sorted(set(labels))}
            expected = {k: e for k, (_, e) in uniform(found).items() if e > 0}
            return {
                **row,
                "bits": found.bits_per_weight(choice),
                "foretold": error_of(found, choice),
                **{f"foretold of {label}": error for label, error in expected.items()},
                "forms": ", ".join(f"{n} {label}" for label, n in counts.items()),
                "measuring": took,
            }

        baseline = f"{budget} bits: integers"
        ways = [options.measured, options.bits, options.forms, options.groups]
        return Variant(name, measure, settings=[budget, error, ways], baseline=baseline)

    for budget, bits in BUDGETS.items():
        grid = {"bits": bits, "group_size": GROUP}
        yield recipes.variant(
            f"{budget} bits: integers",
            [{options.quantizer: grid}],
            baseline=f"{budget} bits: integers",
        )
        for error in options.errors:
            by = "" if options.measured == "rtn" else f", measured with {options.measured}"
            yield mixed(f"{budget} bits: mixed by {error}{by}", budget, error)
    if options.quantizer in ("gptq", "reconstruct", "signround"):
        entry = {options.quantizer: {"grid": "nvfp4"}}
        yield recipes.variant("4.5 bits: nvfp4", [entry], baseline="4.5 bits: integers")


def _measured(bench: Bench, recipes: Recipes, error: str) -> Sensitivity:
    """On a few calibration rows."""
    options = bench.options
    data: dict[str, Any] = {
        "model": str(recipes.model),
        "output": "out",
        "format": "compressed-tensors",
        "passes": [{options.measured: {"bits": 4, "group_size": GROUP}}],
        "calibration": {
            "data": options.calibration,
            "samples": options.rows,
            "length": options.length,
        },
    }
    kept = options.sensitivities and options.sensitivities / f"{error}.json"
    if kept and kept.exists():
        return parse_sensitivity(kept.read_bytes(), where=str(kept))
    recipe = make_recipe(data)
    tokens = calibration_tokens(load_tokenizer(recipes.model), recipe.calibration, seed=recipe.seed)
    found = measure_sensitivity(
        data,
        recipes.source,
        options.bits,
        tokens.ids,
        device=bench.device,
        batch=options.batch,
        forms=options.forms,
        groups=options.groups,
        weighted=error == "kl",
    )
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(found.model_dump_json(), "utf-8")
    return found
