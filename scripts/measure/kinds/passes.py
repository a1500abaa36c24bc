"""Any passes on a checkpoint, or else rtn and awq: perplexity, divergence and time.

    python scripts/anchor_texts.py TEXTS
    python scripts/measure/run.py passes SMOLLM2 --group-size 64 \\
        --calibration TEXTS/calibration.txt --evaluation TEXTS/moby.txt
    python scripts/measure/run.py passes MODEL --pass "awq: {bits: 4, duo: true}" "[awq, fp8]"

KL tells settings apart far better than perplexity on as little text as this.
"""

import argparse
import itertools
from collections.abc import Iterator

import yaml
from variant import Bench, Variant

from recipes import Recipes, text_options


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, GGUF file or Hub id")
    parser.add_argument("--group-size", type=int, default=64, help="of the rows without --pass")
    parser.add_argument("--pass", dest="passes", nargs="+", help="or lists, as in a recipe")
    parser.add_argument("--evaluation", default="bundled/fiction", help="held-out data")
    parser.add_argument("--propagate", choices=("quantized", "original"), default="quantized")
    parser.set_defaults(device="cpu")
    text_options(parser, samples=16, length=256, windows=8)


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    recipes = Recipes(bench, options.model, {"": (options.evaluation, options.windows)})
    yield recipes.itself("unquantized")
    default = [
        f"{name}: {{bits: {bits}, group_size: {options.group_size}, symmetric: {symmetric}}}"
        for bits, symmetric, name in itertools.product((4, 3), ("false", "true"), ("rtn", "awq"))
    ]
    for setting in options.passes or default:
        passes = yaml.safe_load(setting)
        yield recipes.variant(
            setting,
            passes if isinstance(passes, list) else [passes],
            baseline="unquantized",
            propagate=options.propagate,
            calibration={"sampling": "consecutive"},
        )
