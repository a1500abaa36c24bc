"""Variants that are recipes: each is run, its files are read back, and held-out text goes through
them with quantized inputs, cache and attention policy applied, in float32."""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import windows
from torch import Tensor
from variant import Bench, Figures, Variant

from compressor.attention.evaluation import as_stored
from compressor.checkpoint.find import locate
from compressor.checkpoint.source import Source, open_source
from compressor.evaluate.perplexity import token_scores
from compressor.plan.calibration import Calibration
from compressor.plan.recipe import make_recipe
from compressor.run.session import compile_checkpoint, prepare
from compressor.run.tokens import calibration_tokens
from compressor.runner.sweep import FinalStates, run_blocks
from compressor.runner.tokenizer import load_tokenizer


def text_options(
    parser: argparse.ArgumentParser,
    *,
    calibration: str = "bundled/prose",
    samples: int = 128,
    length: int = 512,
    windows: int = 65,
    window: int = 512,
) -> None:
    """What a recipe is calibrated on, and how much is read of held-out text."""
    parser.add_argument("--calibration", default=calibration, help="a recipe's data, or a file")
    parser.add_argument("--samples", type=int, default=samples, help="rows of calibration tokens")
    parser.add_argument("--length", type=int, default=length, help="tokens of each")
    parser.add_argument("--windows", type=int, default=windows, help="rows of held-out tokens")
    parser.add_argument("--window", type=int, default=window, help="tokens of each")


def megabytes(folder: Path) -> float:
    """What a checkpoint's tensors take."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


class Recipes:
    """A model, held-out tokens of each kind, and what the model says of them.

    texts  kind → a recipe's data, and how many windows of it; with one kind figures have no names
    """

    def __init__(self, bench: Bench, model: str, texts: Mapping[str, tuple[str, int]]) -> None:
        self.bench, self.options = bench, bench.options
        self.source = locate(model, fetch=True).source
        self.model = self.source.checkpoint.folder
        tokenizer = load_tokenizer(self.model)
        parts = {
            kind: windows(
                tokenizer,
                read_documents(data, part="held_out"),
                windows=count,
                length=self.options.window,
            ).ids
            for kind, (data, count) in texts.items()
        }
        self.tokens = torch.cat(list(parts.values()))
        self.kinds = [kind for kind, ids in parts.items() for _ in ids]
        self.original = self.stream(self.source)

    def stream(self, source: Source) -> FinalStates:
        """The held-out tokens after all blocks of a checkpoint."""
        models = [as_stored(source)]
        run = {"device": self.bench.device, "dtype": torch.float32, "batch": self.options.batch}
        return run_blocks(models, self.tokens, **run)[0]

    def scores(self, source: Source) -> Figures:
        """For each window: negative log-likelihood and KL to the model; and agreement with it."""
        counted = torch.ones_like(self.tokens[:, 1:], dtype=torch.bool)
        stream = self.original if source is self.source else self.stream(source)
        nll, _, kl, top1 = token_scores([stream, self.original], self.tokens, counted)
        found: Figures = {}
        for kind in dict.fromkeys(self.kinds):
            rows = [i for i, other in enumerate(self.kinds) if other == kind]
            suffix = f" {kind}" if len(set(self.kinds)) > 1 else ""
            found[f"nll{suffix}"] = nll[rows].mean(1).tolist()
            found[f"kl{suffix}"] = kl[rows].mean(1).tolist()
        return {**found, "top1": float(top1.mean())}

    def itself(self, name: str) -> Variant:
        """The model."""
        return Variant(name, lambda: self.scores(self.source))

    def foreign(
        self, name: str, make: Callable[[Tensor, Path], None], *, baseline: str, settings: Any
    ) -> Variant:
        """What another program makes of the model and the same calibration rows, in a folder."""

        def measure() -> Figures:
            with tempfile.TemporaryDirectory(dir=self.bench.work) as folder:
                started = time.perf_counter()
                make(self.rows(), Path(folder))
                seconds = time.perf_counter() - started
                made = open_source(Path(folder))
                size = {"MB": megabytes(Path(folder))} if made.quantized else {}
                return {**self.scores(made), **size, "seconds": seconds}

        return Variant(name, measure, settings=settings, baseline=baseline)

    def rows(self) -> Tensor:
        """Calibration tokens, as a recipe without a seed of its own gets them."""
        options = self.options
        lengths = {"samples": options.samples, "length": options.length}
        calibration = Calibration.model_validate({"data": options.calibration, **lengths})
        return calibration_tokens(load_tokenizer(self.model), calibration, seed=0).ids

    def variant(
        self,
        name: str,
        passes: Sequence[Any],
        *,
        baseline: str,
        **more: Any,
    ) -> Variant:
        """A recipe of the model; `more` are further keys of it."""
        options, output = self.options, self.bench.work / "out"
        lengths = {"samples": options.samples, "length": options.length}
        recipe = {
            "calibration": {"data": options.calibration, **lengths, **more.pop("calibration", {})},
            "passes": list(passes),
            **more,
        }

        def measure() -> Figures:
            shutil.rmtree(output, ignore_errors=True)
            started = time.perf_counter()
            data = {**recipe, "model": str(self.model), "output": str(output)}
            done = compile_checkpoint(prepare(make_recipe(data), device=self.bench.device))
            seconds = time.perf_counter() - started
            errors: dict[str, list[float]] = {}
            for row in (row for unit in done.units for row in unit.rows):
                if row.get("error") is not None:
                    kind = str(row.get("error_of", "output"))
                    errors.setdefault(f"error of {kind}", []).append(float(row["error"]))
            means = {kind: sum(values) / len(values) for kind, values in errors.items()}
            scores = self.scores(open_source(output))
            return {**scores, "MB": megabytes(output), "seconds": seconds, **means}

        return Variant(name, measure, settings=recipe, baseline=baseline)
