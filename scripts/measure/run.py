"""Measure ways to compress a model on held-out text, and print tables with standard errors.

    python scripts/measure/run.py SMOLLM2 --device cuda --grids w4-asymmetric --methods rtn gptq
    python scripts/measure/run.py MODEL --pass "awq: {bits: 4, duo: true}" "[awq, fp8]"

Each row is a run of the compressor whose files are read back: held-out windows of each kind of
bundled text go through them in float32, with quantized inputs, cache and attention policy applied.
A failed row leaves the others. With --json, rows that the file holds for the same settings are not
measured again, and `scripts/quality_page.py --add` takes them.
"""

import json
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from compressor_calibration.bundled import KINDS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quality_page import Row, sections

from compressor.attention.evaluation import as_stored
from compressor.checkpoint.find import locate
from compressor.checkpoint.source import Source, open_source
from compressor.errors import CompressError
from compressor.evaluate.perplexity import token_scores
from compressor.evaluate.settings import Evaluation
from compressor.plan.recipe import make_recipe
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.run.tokens import evaluation_tokens
from compressor.runner.sweep import FinalStates, run_blocks
from compressor.runner.tokenizer import load_tokenizer

GRIDS: dict[str, dict[str, Any]] = {
    **{
        f"w{bits}-{name}": {"bits": bits, "group_size": 64, "symmetric": name == "symmetric"}
        for bits in (4, 3, 2, 8)
        for name in ("asymmetric", "symmetric")
    },
    "w3-g32": {"bits": 3, "group_size": 32},
    "w4-g32": {"bits": 4, "group_size": 32},
    "w4-channel": {"bits": 4, "group_size": None},
    "nvfp4": {"grid": "nvfp4"},
    "mxfp4": {"grid": "mxfp4"},
    "w4a8": {"bits": 4, "group_size": 64, "activations": "token"},
    "w8a8": {"bits": 8, "group_size": None, "activations": "token"},
}
HEAD = {"targets": "lm_head", "ignore": [], "group_size": 64}
METHODS: dict[str, list[dict[str, dict[str, Any]]]] = {
    # Passes, of which the last gets the grid as well.
    "rtn": [{"rtn": {}}],
    "rtn, head in 8 bits": [{"rtn": {**HEAD, "bits": 8}}, {"rtn": {}}],
    "rtn, head in 4 bits": [{"rtn": {**HEAD, "bits": 4}}, {"rtn": {}}],
    "rtn, cache in fp8": [{"kv_cache": {"element": "fp8"}}, {"rtn": {}}],
    "rtn, cache in int8": [{"kv_cache": {"element": "int8"}}, {"rtn": {}}],
    "gptq": [{"gptq": {}}],
    "gptq as published": [{"gptq": {"scales": "range", "damping": 0.01, "correction": 0.0}}],
    "gptq uncorrected": [{"gptq": {"correction": 0.0}}],
    "signround": [{"signround": {}}],
    "reconstruct fast": [{"reconstruct": {"preset": "fast"}}],
    "reconstruct good": [{"reconstruct": {"preset": "good"}}],
    "awq": [{"awq": {}}],
    "awq + gptq": [{"awq": {}}, {"gptq": {}}],
    "rotate": [{"rotate": {}}, {"rtn": {}}],
    "rotate + gptq": [{"rotate": {}}, {"gptq": {}}],
    "rotate + reconstruct fast": [{"rotate": {}}, {"reconstruct": {"preset": "fast"}}],
}


def parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, GGUF file or Hub id")
    parser.add_argument("--grids", nargs="*", choices=GRIDS, default=list(GRIDS)[:3])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pass", dest="passes", nargs="+", help="or lists, in place of methods")
    parser.add_argument("--calibration", default="bundled", help="a recipe's data, or a file")
    parser.add_argument("--samples", type=int, default=128, help="rows of calibration tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--windows", type=int, default=24, help="held-out rows of each kind")
    parser.add_argument("--window", type=int, default=512, help="tokens of each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="rows are kept here, and resumed from")
    return parser


def wanted(options: Namespace) -> Iterator[tuple[str, str, list[Any]]]:
    """Grid, method and passes of each row."""
    for words in options.passes or ():
        passes = yaml.safe_load(words)
        yield "passes", words, passes if isinstance(passes, list) else [passes]
    for grid in () if options.passes else options.grids:
        for method in options.methods:
            *before, last = METHODS[method]
            ((name, more),) = last.items()
            floats = GRIDS[grid].get("grid") if name == "rtn" else None  # rounded by their own pass
            yield grid, method, [*before, {floats: {}} if floats else {name: GRIDS[grid] | more}]


class Bench:
    """A model, held-out tokens of each kind of text, and what the model says of them."""

    def __init__(self, options: Namespace) -> None:
        self.options, self.device = options, choose_device(options.device)
        self.source = locate(options.model, fetch=True).source
        tokenizer = load_tokenizer(self.source.checkpoint.folder)
        text = {"windows": options.windows, "length": options.window}
        wanted = [Evaluation(data=f"bundled/{kind}", **text) for kind in KINDS]
        parts = [evaluation_tokens(tokenizer, each, calibration=None) for each in wanted]
        self.tokens = torch.cat([part.ids for part in parts])
        self.original = self.states(self.source)

    def states(self, source: Source) -> FinalStates:
        """The held-out tokens after all blocks of a checkpoint."""
        return run_blocks(
            [as_stored(source)],
            self.tokens,
            device=self.device,
            dtype=torch.float32,
            batch=8,  # rows of tokens at a time
        )[0]

    def figures(self, states: FinalStates) -> dict[str, Any]:
        """For each window: negative log-likelihood and KL to the model; and agreement with it."""
        counted = torch.ones_like(self.tokens[:, 1:], dtype=torch.bool)
        nll, _, kl, top1 = token_scores([states, self.original], self.tokens, counted)
        found: dict[str, Any] = {"top1": round(float(top1.mean()), 4)}
        for what, values in (("nll", nll), ("kl", kl)):
            for kind, rows in zip(KINDS, values.mean(1).split(self.options.windows), strict=True):
                found[f"{what} {kind}"] = [round(value, 5) for value in rows.tolist()]
        return found

    def compiled(self, passes: Sequence[Any], output: Path) -> dict[str, Any]:
        """Figures of what passes write."""
        options = self.options
        names = {n for entry in passes for n in ([entry] if isinstance(entry, str) else entry)}
        lengths = {"samples": options.samples, "length": options.length}
        recipe = {
            "model": str(self.source.checkpoint.folder),
            "output": str(output),
            "calibration": {"data": options.calibration, **lengths},
            "passes": passes,
            "untie": "rotate" in names or any("lm_head" in str(entry) for entry in passes),
        }
        began = time.perf_counter()
        compile_checkpoint(prepare(make_recipe(recipe), device=self.device))
        seconds = round(time.perf_counter() - began, 1)
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        found = self.figures(self.states(open_source(output)))
        return {"MB": round(size / 1e6, 1), "seconds": seconds, **found}


def main() -> None:
    options = parser().parse_args()
    unlike = {"json", "grids", "methods", "passes", "device"}
    settings = {key: value for key, value in vars(options).items() if key not in unlike}
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    rows: list[Row] = kept.get("rows", []) if kept.get("settings") == settings else []
    bench = Bench(options)
    model, source = bench.source.checkpoint.folder.name, Path(options.calibration).stem
    about = {"model": "" if model == "smollm2-135m" else model}

    def add(row: Row) -> None:
        rows.append({**about, **row})
        if options.json:
            options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))

    if not rows:
        original = {"grid": "", "method": "original", "calibration": ""}
        add({**original, **bench.figures(bench.original)})
    done = {(row["grid"], row["method"]) for row in rows}
    for grid, method, passes in wanted(options):
        if (grid, method) in done:
            continue
        read = "" if method.startswith("rtn") else {"bundled": "mixture"}.get(source, source)
        try:
            with tempfile.TemporaryDirectory() as folder:
                figures = bench.compiled(passes, Path(folder, "out"))
        except (CompressError, RuntimeError) as error:
            if not isinstance(error, CompressError):
                traceback.print_exc()
            print(f"{grid}: {method}: failed: {error}", flush=True)
            continue
        add({"grid": grid, "method": method, "calibration": read, **figures})
        print(f"{grid}: {method}: {figures['seconds']} s, top-1 {figures['top1']:.3f}", flush=True)
    grids = {grid: grid for grid, _, _ in wanted(options)}
    print("", *sections(rows, grids), sep="\n")


if __name__ == "__main__":
    main()
