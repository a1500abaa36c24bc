"""Deltas of a fine-tune on held-out text of its style: perplexity, KL from it, bytes and time.

    python scripts/measure/run.py bitdelta BASE FINE --held-out moby.txt --range 400000:460000

Base and fine-tune, then deltas: initial scales, scales distilled on the logits and layer by layer,
more bits, and a low-rank delta (the truncated SVD of each difference, factors in 16 bits) that
takes no more bytes than one sign for each weight. Everything but the linears of the blocks is the
fine-tune's own in all of them.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from variant import Bench, Figures, Variant

from compressor.checkpoint.delta.base import base_weights
from compressor.checkpoint.delta.source import open_model
from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.source import Source, as_source, open_source
from recipes import Recipes, text_options


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path)
    parser.add_argument("fine", type=Path)
    parser.add_argument("--held-out", type=Path, required=True, help="text in FINE's style")
    parser.add_argument("--range", default="", help="characters of it, such as 400000:460000")
    parser.add_argument("--steps", type=int, default=200, help="of distillation, 4 rows each")
    parser.add_argument("--lr", type=float, help="if not 3 %% of the median initial scale")
    parser.add_argument("--propagate", choices=("quantized", "original"), default="quantized")
    parser.add_argument("--more", action="store_true", help="also distil two bits")
    text_options(parser, samples=800, length=128, windows=8, window=1024)


@dataclass(frozen=True, slots=True)
class Replaced(Checkpoint):
    """A checkpoint of which some tensors are others, in memory."""

    tensors: dict[str, Tensor]
    rest: Checkpoint

    def read(
        self, names: Iterable[str], *, pin: bool = False, threads: int = 4
    ) -> dict[str, Tensor]:
        wanted = list(names)
        found = self.rest.read([n for n in wanted if n not in self.tensors], threads=threads)
        return {name: self.tensors.get(name, found.get(name)) for name in wanted}


def low_rank(base: Source, fine: Source, *, device: torch.device) -> tuple[Source, int]:
    """The fine-tune with each linear's difference cut to as many ranks as one bit pays for, and
    the bytes of all that is not the base's."""
    checkpoint = fine.checkpoint
    tensors, size = {}, checkpoint.nbytes
    for unit in fine.layout.blocks:
        linears = [linear for linear in unit.linears if linear.role != "router"]
        names = [linear.name for linear in linears]
        before, after = base_weights(base, names), base_weights(fine, names)
        for linear in linears:
            name = linear.weight_name
            old, new = before[name].to(device).float(), after[name].to(device).float()
            rows, columns = linear.shape
            rank = max(1, rows * columns // (16 * (rows + columns)))
            u, s, v = torch.linalg.svd(new - old, full_matrices=False)
            left = (u[:, :rank] * s[:rank].sqrt()).to(torch.bfloat16).float()
            right = (v[:rank] * s[:rank].sqrt()[:, None]).to(torch.bfloat16).float()
            tensors[name] = (old + left @ right).to(after[name].dtype).cpu()
            size += 2 * rank * (rows + columns) - checkpoint.entries[name].spec.nbytes
    entries = (checkpoint.folder, checkpoint.config, checkpoint.entries)
    return as_source(Replaced(*entries, tensors, checkpoint)), size


def variants(bench: Bench) -> Iterator[Variant]:
    options, text = bench.options, bench.work / "held_out.txt"
    start, _, stop = options.range.partition(":")
    whole = options.held_out.read_text("utf-8")
    text.write_text(whole[int(start or 0) : int(stop) if stop else None], "utf-8")
    recipes = Recipes(bench, str(options.fine), {"": (str(text), options.windows)})
    base, fine = open_source(options.base), "fine-tune"

    def ranked() -> Figures:
        started = time.perf_counter()
        source, size = low_rank(base, recipes.source, device=bench.device)
        seconds = time.perf_counter() - started
        return {**recipes.scores(source), "MB": size / 1e6, "seconds": seconds}

    yield recipes.itself(fine)
    yield Variant("base", lambda: recipes.scores(base), baseline=fine)
    yield Variant("low rank, as large as 1 bit", ranked, baseline=fine)
    trained = {"distill": "logits", "steps": options.steps, "lr": options.lr}
    rows = {
        "1 bit, initial scales": {"distill": "none"},
        "1 bit, fitted layer by layer": {"distill": "layer"},
        "2 bits, initial scales": {"distill": "none", "bits": 2},
        "4 bits, initial scales": {"distill": "none", "bits": 4},
        # What takes longest comes last: a measurement that is cut short has all the others.
        "1 bit, distilled on logits": trained,
        **({"2 bits, distilled on logits": {**trained, "bits": 2}} if options.more else {}),
    }
    for name, parameters in rows.items():
        yield recipes.variant(
            name,
            [{"bitdelta": {"base": str(options.base), **parameters}}],
            baseline=fine,
            opened=lambda output: open_model(output, base=str(options.base)),
            propagate=options.propagate,
        )
