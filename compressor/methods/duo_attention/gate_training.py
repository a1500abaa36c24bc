"""Trains head gates through a frozen model: DuoAttention's optimisation (arXiv 2410.10819)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import Interrupted
from compressor.methods.common.context import LearnContext
from compressor.methods.common.needles import Needles, make_row
from compressor.methods.common.training_state import keep_state, resume_state
from compressor.methods.duo_attention.two_stream import TwoStream
from compressor.numerics.head_gates import distillation_loss, hoyer_square, schedule
from compressor.runner.pieces import Part, Piece, Pieces, pieces_of
from compressor.runner.source_model import SourceModel

SAVE_EVERY = 20


@dataclass(frozen=True, slots=True)
class Penalty:
    """What pushes gates to zero.

    kind    l1: mean |a|;  hoyer2: effective number of active gates over their number
    weight  of it beside the distillation loss
    budget  for hoyer2, the share of active gates below which a second term of it is silent
    """

    kind: str
    weight: float
    budget: float | None = None

    def __call__(self, gates: Tensor) -> Tensor:
        if self.kind == "l1":
            return self.weight * gates.abs().mean()
        active = hoyer_square(gates) / gates.numel()
        over = 0 if self.budget is None else (active - self.budget).clamp(min=0)
        return self.weight * (active + over)


def train_gates(
    model: SourceModel,
    context: LearnContext,
    *,
    start: Tensor,
    data: Needles,
    haystack: Sequence[int],
    penalty: Penalty,
    sinks: int,
    window: int,
    steps: int,
    rate: float,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Train gates from `start` [layers, kv_heads]: gates float32 in [0, 1], and both losses of
    every step [steps, 2].

    Each step draws its rows from its own seed, and the state is kept in the scratch folder, so that
    a run that was killed goes on to the same gates. Ranks hold the whole model each, and share the
    rows of a step. Gates are clamped before every step, and once more at the end, where the
    reference leaves small negative values.
    """
    encode = model.tokenizer()
    gates = start.detach().clone().to(model.device, torch.float32).requires_grad_()
    optimiser = torch.optim.AdamW([gates], lr=rate, weight_decay=0.0)
    trained, scratch = {"gates": gates}, context.scratch
    first, state = resume_state(scratch, optimiser, trained)
    losses = state.get("losses", torch.zeros(steps, 2))
    running = Pieces(context.ranks, model.device)
    with TwoStream(model, sinks=sinks, window=window).loaded() as streams:
        for step in range(first, steps):
            if context.stops():
                keep_state(scratch, optimiser, trained, step, losses=losses)
                raise Interrupted
            with torch.no_grad():
                gates.clamp_(0, 1)
            draw = random.Random(f"{context.seed} {step}")
            length = draw.choice(data.row_lengths)
            rows = [
                make_row(encode, haystack, data=data, length=length, draw=draw)
                for _ in range(batch)
            ]
            ids = torch.stack([row.ids for row in rows])
            scored = torch.stack([row.scored for row in rows]).to(model.device)

            def of_piece(piece: Piece, ids: Tensor = ids, scored: Tensor = scored) -> Part:
                own = torch.tensor(piece)
                pair = streams.run(ids[own], gates.clamp(0, 1))
                places = scored[own.to(scored.device)]
                loss = distillation_loss(pair.full, pair.gated, places, count=int(scored.sum()))
                return loss, torch.autograd.grad(loss, [gates])

            pieces = pieces_of(range(batch), context.batch)
            (distilled,), (gradient,) = running.gradients(pieces, of_piece, [gates])
            pushed = penalty(gates)
            (gates.grad,) = torch.autograd.grad(pushed, [gates])
            gates.grad += gradient
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(step, steps)
            optimiser.step()
            optimiser.zero_grad()
            losses[step] = torch.tensor([distilled, float(pushed.detach())])
            if (step + 1) % SAVE_EVERY == 0:
                keep_state(scratch, optimiser, trained, step + 1, losses=losses)
            context.progress("duo_attention", step + 1, steps)
    return gates.detach().clamp(0, 1).cpu(), losses


def start_gates(
    shape: tuple[int, int], *, spread: float, seed: int, scores: Tensor | None = None
) -> Tensor:
    """First gates [layers, kv_heads]: 1 less a random part up to `spread`, or copy scores relative
    to the highest of them."""
    if scores is not None:
        return (scores / scores.max().clamp(min=1e-8)).clamp(0, 1)
    generator = torch.Generator().manual_seed(seed)
    return 1 - spread * torch.rand(shape, generator=generator)
