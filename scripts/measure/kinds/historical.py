"""Learned rounding of all blocks together, with and without hidden states of earlier steps.

    python scripts/measure/run.py historical SMOLLM2 --device cuda --json historical.json

Offsets and ranges of every block (SignRound's) go along the sign of the gradient of the squared
error of final hidden states. With a history (FreshGNN's criteria) a row whose state at the middle
block is known starts there: the blocks before it neither run nor get a gradient of that row. The
states are stale, since those blocks change. `blocks` counts rows through a block while training;
`fewer steps` stops training without a history after as many as the history took.
"""

import argparse
import random
from collections.abc import Iterator
from typing import Any

import torch
from compressor_calibration.sources import read_documents
from compressor_calibration.tokens import windows
from torch import Tensor, nn
from torch.nn.utils import parametrize
from variant import Bench, Figures, Variant

from compressor.checkpoint.find import locate
from compressor.ir.qtensor import QuantSpec
from compressor.methods.signround import SignRounding
from compressor.numerics.historical import NOWHERE, History, stable
from compressor.runner.source_model import SourceModel
from compressor.runner.tokenizer import load_tokenizer

WAYS = ("none", "gradient and age", "age", "random", "fewer steps")


class Learned(nn.Module):
    """A weight as it is rounded now."""

    def __init__(self, rounding: SignRounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, weight: Tensor) -> Tensor:
        return self.rounding.weight().to(weight.dtype)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, GGUF file or Hub id, of Llama's layout")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--stale", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--rate", type=float, default=0.9)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])


class Training:
    """One training of a fresh copy of the model."""

    def __init__(self, options: argparse.Namespace, source: Any, device: torch.device) -> None:
        self.options, self.device = options, device
        loaded = SourceModel(source, device=device, dtype=torch.float32)
        self.model = loaded.whole()
        self.layers = self.model.model.layers
        self.blocks = 0
        tokenizer = load_tokenizer(source.checkpoint.folder)
        cut = {"length": options.length}
        text = read_documents("bundled/prose", part="calibration")
        self.ids = windows(tokenizer, text, windows=options.rows, **cut).ids
        text = read_documents("bundled/prose", part="held_out")
        self.held_out = windows(tokenizer, text, windows=options.windows, **cut).ids
        self.targets = torch.cat([self.final(part) for part in self.ids.split(8)])
        spec = QuantSpec("int", options.bits, "group", options.group_size)
        self.roundings = []
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    rounding = SignRounding(module.weight.detach(), spec, ranges=True)
                    parametrize.register_parametrization(module, "weight", Learned(rounding))
                    self.roundings.append(rounding)

    @torch.no_grad()
    def final(self, ids: Tensor) -> Tensor:
        """What leaves the last block, before the norm."""
        return self.upper(self.embed(ids), 0, len(self.layers))

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(ids.to(self.device))

    def upper(self, hidden: Tensor, first: int, last: int) -> Tensor:
        places = torch.arange(hidden.shape[1], device=self.device)[None]
        tables = self.model.model.rotary_emb(hidden, places)
        for layer in self.layers[first:last]:
            out = layer(hidden, position_embeddings=tables, attention_mask=None)
            hidden = out[0] if isinstance(out, tuple) else out
            self.blocks += hidden.shape[0]
        return hidden

    def run(self, way: str, *, stale: int, steps: int, seed: int) -> Figures:
        options, middle, last = self.options, len(self.layers) // 2, len(self.layers)
        kept = 0 if way in ("none", "fewer steps") else stale
        history = History(options.rows, rate=options.rate, stale=kept)
        states = torch.zeros(options.rows, *self.targets.shape[1:], device=self.device)
        draw, order = random.Random(seed), []
        self.blocks, drifts, served_rows = 0, [], 0
        for step in range(steps):
            if len(order) < options.rows_per_step:
                order = draw.sample(range(options.rows), options.rows)
            rows, order = order[: options.rows_per_step], order[options.rows_per_step :]
            places = history.served(rows, step) if history.stale else [NOWHERE] * len(rows)
            known = [r for r, place in zip(rows, places, strict=True) if place != NOWHERE]
            new = [r for r in rows if r not in known]
            served_rows += len(known)
            parts = [states[history.place[r]][None] for r in known]
            if new:
                parts.append(self.upper(self.embed(self.ids[new]), 0, middle))
            border = torch.cat(parts)
            border = border if border.requires_grad else border.detach().requires_grad_()
            border.retain_grad()
            error = self.upper(border, middle, last) - self.targets[[*known, *new]]
            error.square().mean().backward()
            grads = border.grad.flatten(1).norm(dim=1).cpu()
            rate = (1 - step / steps) / steps
            for rounding in self.roundings:
                rounding_step(rounding, rate)
            if history.stale:
                able = self.able(way, grads, len(known), options.rate, draw)
                chosen = [r for r, one in zip([*known, *new], able, strict=True) if one]
                found = admitted(history, chosen, step)
                for row, place in found.items():
                    states[place] = border[[*known, *new].index(row)].detach()
            if step % 8 == 7 and history.place:
                drifts.append(self.drift(history, states, middle))
        counted = self.blocks
        with torch.no_grad():
            error = (self.final(self.ids[:32]) - self.targets[:32]).square().mean()
        return {
            "nll": self.nll(),
            "training error": float(error),
            "blocks": counted,
            "served": served_rows,
            "drift": max(drifts, default=0.0),
        }

    def able(
        self, way: str, grads: Tensor, known: int, rate: float, draw: random.Random
    ) -> list[bool]:
        """Which rows are taken in: none that was served."""
        if way == "random":
            taken = [draw.random() < rate for _ in grads]
        else:
            taken = [True] * len(grads) if way == "age" else stable(grads, rate).tolist()
        return [one and i >= known for i, one in enumerate(taken)]

    @torch.no_grad()
    def drift(self, history: History, states: Tensor, middle: int) -> float:
        """Largest relative distance of some states that are kept to what they would be now."""
        before, rows = self.blocks, list(history.place)[:8]
        now = self.upper(self.embed(self.ids[rows]), 0, middle)
        old = states[[history.place[r] for r in rows]]
        self.blocks = before
        return float(((now - old).flatten(1).norm(dim=1) / now.flatten(1).norm(dim=1)).max())

    @torch.no_grad()
    def nll(self) -> list[float]:
        found = []
        for row in self.held_out:
            logits = self.model(input_ids=row[None].to(self.device), use_cache=False).logits[0, :-1]
            found.append(
                float(nn.functional.cross_entropy(logits.float(), row[1:].to(self.device)))
            )
        return found


def admitted(history: History, rows: list[int], step: int) -> dict[int, int]:
    """Row → place of rows that all are to be taken in."""
    if not rows:
        return {}
    return history.admit(rows, torch.zeros(len(rows)), step, [True] * len(rows))


def rounding_step(rounding: SignRounding, rate: float) -> None:
    """Against the sign of the gradient, which is then forgotten."""
    with torch.no_grad():
        rounding.descend(rate)
    for parameter in rounding.parameters():
        parameter.grad = None


def variants(bench: Bench) -> Iterator[Variant]:
    options = bench.options
    source = locate(options.model, fetch=True).source
    taken: dict[tuple[int, int], int] = {}

    def variant(way: str, stale: int, seed: int) -> Variant:
        def measure() -> Figures:
            training = Training(options, source, bench.device)
            steps = options.steps
            if way == "fewer steps":
                whole = options.rows_per_step * len(training.layers)
                steps = max(1, taken.get((stale, seed), whole * steps) // whole)
            figures = training.run(way, stale=stale, steps=steps, seed=seed)
            if way == "gradient and age":
                taken[stale, seed] = int(figures["blocks"])
            return {**figures, "steps": steps}

        name = way if way == "none" else f"{way} {stale}"
        settings = {"way": way, "stale": stale, "seed": seed}
        return Variant(
            f"{name}, seed {seed}", measure, settings=settings, baseline=f"none, seed {seed}"
        )

    for seed in options.seeds:
        yield variant("none", 0, seed)
        for stale in options.stale:
            for way in WAYS[1:]:
                yield variant(way, stale, seed)
