"""Offsite-Tuning's five rows on held-out text of the style that was tuned on: perplexity of the
full model and of an emulator before tuning, of the emulator that was tuned, of the full model with
the tuned blocks plugged in, and of the full model that was tuned itself.

    python scripts/measure/run.py offsite SMOLLM2 --keep 18 --distill 600 --steps 240

The emulator is distilled on --calibration, text of another style. What is tuned on is the
calibration part of --style, and the step with the lowest loss on its last rows is taken: for the
emulator by its own loss, since whoever tunes it has nothing else. It does its work where the
plugged model beats the full one before tuning; what it keeps back is by how much the plugged model
beats the tuned emulator. With several --lr each is tuned and plugged by itself.
"""

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import windows
from finetune_smollm2 import tune
from torch import Tensor
from transformers import AutoModelForCausalLM
from variant import Bench, Figures, Variant

from compressor.checkpoint.adapter import open_adapter
from compressor.checkpoint.find import locate
from compressor.checkpoint.offsite import read_offsite_record
from compressor.checkpoint.source import open_source
from compressor.plan.recipe import make_recipe
from compressor.run.plug import plug
from compressor.run.session import compile_checkpoint, prepare
from compressor.runner.tokenizer import load_tokenizer
from recipes import Recipes, text_options

CLAIMS = [
    ("plugged", "full model, zero-shot"),
    ("plugged", "emulator, tuned"),
    ("full model, tuned", "plugged"),
]
VALIDATION = 16
"""One row of the style's in so many is validated on."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--pads", type=int, nargs=2, default=[2, 2])
    parser.add_argument(
        "--keep", type=int, nargs="+", default=[8], help="how many blocks of the middle, or which"
    )
    parser.add_argument("--distill", type=int, default=600, help="steps of distillation; 0: none")
    parser.add_argument("--distill-lr", type=float, default=1e-4)
    parser.add_argument("--skip-first", type=int, default=1, help="tokens not distilled on")
    parser.add_argument("--style", default="bundled/fiction", help="what is tuned on")
    parser.add_argument("--rows", type=int, default=256, help="rows of it")
    parser.add_argument("--steps", type=int, default=240, help="of tuning, 8 rows each")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--full-lr", type=float, default=2e-5, help="where all blocks are tuned")
    text_options(parser, samples=256, windows=24)


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    recipes = Recipes(bench, options.model, {"": (options.style, options.windows)})
    data = windows(
        load_tokenizer(recipes.model),
        read_documents(options.style, part="calibration"),
        windows=options.rows,
        length=options.length,
    ).ids
    folders = {name: bench.work / name for name in ("emulator", "tuned", "plugged", "whole")}
    first = "full model, zero-shot"

    def emulate() -> Figures:
        distill = {"steps": options.distill, "lr": options.distill_lr}
        emulator = {
            "pads": options.pads,
            "keep": options.keep if len(options.keep) > 1 else options.keep[0],
            "distill": {**distill, "skip_first": options.skip_first} if options.distill else None,
        }
        recipe = {
            "model": str(recipes.model),
            "output": str(folders["emulator"]),
            "passes": [{"emulator": emulator}],
            "format": "dense",
            "calibration": {
                "data": options.calibration,
                "samples": options.samples,
                "length": options.length,
            },
        }
        started = time.perf_counter()
        done = compile_checkpoint(prepare(make_recipe(recipe), device=bench.device))
        learned: dict[str, Any] = {}
        for row in done.learned[0].result.rows:
            learned = {f"border loss {when}": row[f"loss_{when}"] for when in ("before", "after")}
        seconds = time.perf_counter() - started
        return {**recipes.scores(open_source(folders["emulator"])), **learned, "seconds": seconds}

    def tune_emulator(lr: float) -> Figures:
        record = read_offsite_record(folders["emulator"])
        assert record is not None
        own = [record.kept.index(block) for block in record.adapter_blocks]
        told = tuned(bench, folders["emulator"], folders["tuned"], data, own, lr)
        return {**recipes.scores(open_source(folders["tuned"])), **told}

    def plugged() -> Figures:
        located = locate(str(recipes.model), fetch=False)
        adapter = open_adapter(folders["tuned"], located.source, emulator=folders["emulator"])
        shutil.rmtree(folders["plugged"], ignore_errors=True)
        plug(located, adapter, folders["plugged"])
        return recipes.scores(open_source(folders["plugged"]))

    def tune_whole() -> Figures:
        every = range(len(recipes.source.layout.blocks))
        told = tuned(bench, recipes.model, folders["whole"], data, every, options.full_lr)
        return {**recipes.scores(open_source(folders["whole"])), **told}

    settings = {k: v for k, v in vars(options).items() if k not in ("json", "device")}
    yield recipes.itself(first)
    yield Variant("emulator, zero-shot", emulate, settings, first)
    for lr in options.lr:
        at = "" if len(options.lr) == 1 else f" at {lr:g}"
        follows = {**settings, "lr": lr}
        yield Variant(f"emulator, tuned{at}", partial(tune_emulator, lr), follows, first)
        yield Variant(f"plugged{at}", plugged, follows, first)
    yield Variant("full model, tuned", tune_whole, settings, first)


def tuned(
    bench: Bench, model: Path, output: Path, data: Tensor, blocks: Sequence[int], lr: float
) -> Figures:
    """Tune some blocks of a checkpoint by AdamW, and write the best step in its dtype."""
    source, options = open_source(model), bench.options
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(bench.device)
    whole.eval().requires_grad_(False)  # no dropout
    layers = whole.get_submodule(source.arch.runtime.layers)
    for block in blocks:
        layers[block].requires_grad_(True)
    kept, every = max(1, len(data) // VALIDATION), max(1, options.steps // 12)
    how = {"steps": options.steps, "batch": options.batch, "lr": lr, "every": every}
    started = time.perf_counter()
    found = tune(whole, data[:-kept], data[-kept:], **how)
    seconds = time.perf_counter() - started
    shutil.rmtree(output, ignore_errors=True)
    whole.to(source.checkpoint.dtype).save_pretrained(output)
    return {"step": found["step"], "seconds": seconds}
