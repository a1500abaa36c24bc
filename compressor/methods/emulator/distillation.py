"""Trains the emulator's middle towards what the whole middle makes of the same inputs.

Offsite-Tuning, section 3.2: the loss is the next token's cross entropy and the squared difference
at the border after the last middle block, relative to the teacher's size there. The whole model is
never in memory: what enters and leaves its middle lies on disk (`borders`). The student's blocks
are, in float32 with their moments, and where the cross entropy counts the frozen blocks above them.

Otherwise than in the published code the frozen blocks run without dropout, the teacher in the dtype
of the run and not always in float16, and a `kd_weight` of 0 leaves the cross entropy its weight.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.errors import CheckError, Interrupted
from compressor.ir.frozen import Strict
from compressor.ir.layout import UnitLayout
from compressor.methods.common.context import LearnContext
from compressor.methods.common.training_state import keep_state, resume_state
from compressor.methods.emulator.borders import Borders, record_borders
from compressor.numerics.border_loss import border_loss, teacher_rms
from compressor.runner.block_runner import Block
from compressor.runner.pieces import Part, Piece, Pieces, pieces_of
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution

RECORDS = 10
"""Records of the training's state in one run at most, which are as large as the optimizer's."""
KEEP_SECONDS = 60.0
"""Time between two of them at least: what a kill may cost."""
HELD_OUT = 16
"""One in so many rows is measured on and not trained on."""


class Distill(Strict):
    """How the emulator's middle is trained; the defaults are the published ones."""

    steps: int = Field(2000, ge=1, description="steps of AdamW")
    batch: int = Field(8, ge=1, description="rows of calibration tokens in one step")
    lr: float = Field(1e-4, gt=0, description="learning rate, annealed to 0 by a cosine")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which it rises")
    lm_weight: float = Field(1.0, ge=0, description="weight of the next token's cross entropy")
    kd_weight: float = Field(30.0, ge=0, description="weight of the difference at the border")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    skip_first: int = Field(
        0,
        ge=0,
        description="first tokens of a row that do not count at the border, where a few "
        "huge values would decide",
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if not self.lm_weight and not self.kd_weight:
            raise ValueError("lm_weight and kd_weight are both 0: nothing to train on")
        return self

    def rate(self, step: int) -> float:
        """The learning rate of a step: it rises in a line, then falls as a cosine to 0."""
        rising = int(self.warmup * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.lr * (1 + math.cos(math.pi * done)) / 2

    def order(self, rows: Sequence[int], seed: int) -> Iterator[list[int]]:
        """Rows of each step: all of them once, then again in another order."""
        generator = torch.Generator().manual_seed(seed)
        drawn: list[int] = []
        for _ in range(self.steps):
            while len(drawn) < self.batch:
                drawn += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            yield drawn[: self.batch]
            drawn = drawn[self.batch :]


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over held-out rows: the difference at the border, and the cross entropy in nats, which
    is None where it is not trained on."""

    border: float
    lm: float | None


@dataclass(frozen=True, slots=True)
class Distilled:
    """Trained tensors by name, on the CPU in the model's dtype; what held-out rows say."""

    tensors: Mapping[str, Tensor]
    before: Losses
    after: Losses


def held_out(rows: int) -> list[int]:
    """Rows that are measured on: the last ones."""
    return list(range(rows - max(1, rows // HELD_OUT), rows))


def distill(
    teacher: SourceModel,
    model: SourceModel,
    context: LearnContext,
    *,
    pads: tuple[int, int],
    units: Sequence[UnitLayout],
    settings: Distill,
) -> Distilled:
    """Train the blocks `units` of `model`, which has some of the teacher's.

    A killed run continues at the last record in `context.scratch`. Where no block is left out there
    is nothing to train: the loss is 0 as it stands. Raises CheckError where it diverges.
    """
    ids = context.ids
    borders = record_borders(
        teacher,
        ids,
        pads=pads,
        batch=context.batch,
        scratch=context.scratch.inside("borders"),
        progress=context.progress,
        stops=context.stops,
        ranks=context.ranks,
    )
    dtype = model.source.checkpoint.dtype
    with ExitStack() as stack:
        student = Student(model, units, settings, stack)
        execution = Execution(settings.batch, stopping=context.stops, ranks=context.ranks)
        measured = held_out(ids.shape[0])
        before = student.measure(borders, ids, measured, execution)
        if len(model.layout.blocks) < len(teacher.layout.blocks):
            trained = [row for row in range(ids.shape[0]) if row not in set(measured)]
            _train(student, borders, ids, trained, context, execution)
        after = student.measure(borders, ids, measured, execution)
        tensors = {n: p.detach().to(dtype).cpu() for n, p in student.trained.items()}
    return Distilled(tensors, before, after)


def _train(
    student: Student,
    borders: Borders,
    ids: Tensor,
    rows: Sequence[int],
    context: LearnContext,
    execution: Execution,
) -> None:
    settings = student.settings
    optimizer = torch.optim.AdamW(student.trained.values(), lr=settings.lr, weight_decay=0.0)
    done, _ = resume_state(context.scratch, optimizer, student.trained)
    every, kept = math.ceil(settings.steps / RECORDS), time.monotonic()
    for step, batch in enumerate(settings.order(rows, context.seed)):
        if step < done:
            continue
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        loss = student.gradients(borders, ids, batch, execution)
        if not math.isfinite(loss):
            raise CheckError(
                f"distillation diverged: its loss is {loss} in step {step + 1} of {settings.steps}",
                hint=f"lower distill: lr (now {settings.lr:g}), or raise warmup",
            )
        nn.utils.clip_grad_norm_(student.trained.values(), settings.clip)
        optimizer.step()
        stop = context.stops()
        late = context.ranks.any(time.monotonic() - kept >= KEEP_SECONDS)
        if stop or (late and (step + 1) % every == 0):
            keep_state(context.scratch, optimizer, student.trained, step + 1)
            kept = time.monotonic()
        context.progress(f"distill, loss {loss:.4g}", step + 1, settings.steps)
        if stop:
            raise Interrupted


class Student:
    """Blocks that are trained, and what stands above them.

    trained  float32 parameters by the names of their units
    """

    def __init__(
        self,
        model: SourceModel,
        units: Sequence[UnitLayout],
        settings: Distill,
        stack: ExitStack,
    ) -> None:
        self.model, self.settings = model, settings
        self.trained: dict[str, nn.Parameter] = {}
        self._blocks = [self._block(unit) for unit in units]
        for unit in units:
            for name, tensor in model.tensors(unit.index + 1).items():
                self.trained[name] = nn.Parameter(tensor.float())
        self._above: list[tuple[Block, Mapping[str, Tensor]]] = []
        self._logits: Callable[[Tensor], Tensor] | None = None
        if settings.lm_weight:
            last = max(unit.index for unit in units)
            above = model.layout.blocks[last + 1 :]
            self._above = [(self._block(u), model.tensors(u.index + 1)) for u in above]
            self._logits = stack.enter_context(model.logits(gradients=True))
        self._lengths: set[int] = set()

    def _block(self, unit: UnitLayout) -> Block:
        runner = self.model.runner
        return Block(runner=runner, unit=unit, layer=runner.layers[unit.index], tensors={})

    def middle(self, hidden: Tensor) -> Tensor:
        """What leaves the trained blocks for rows [rows, length, hidden] that enter them."""
        for block in self._blocks:
            hidden = block.functional({n: self.trained[n] for n in block.unit.tensors}, hidden)
        return hidden

    def cross_entropy(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Sum over all next tokens, for what left the trained blocks."""
        assert self._logits is not None
        for block, tensors in self._above:
            hidden = block.functional(tensors, hidden)
        logits = self._logits(hidden[:, :-1].flatten(0, 1))
        targets = ids[:, 1:].to(logits.device).flatten()
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def part(
        self, borders: Borders, ids: Tensor, rows: Sequence[int], piece: Piece
    ) -> tuple[Tensor, Tensor | None]:
        """The shares of a piece of the rows in the border loss and in the cross entropy: over all
        pieces they add up to the means."""
        self._prepare(ids)
        skip, device = self.settings.skip_first, self.model.device
        rms = teacher_rms(borders.outputs.read(rows)[:, skip:]).to(device)
        leaving = self.middle(borders.inputs.read(piece))
        teacher = borders.outputs.read(piece).to(device)
        share = len(piece) / len(rows)
        border = border_loss(leaving[:, skip:], teacher[:, skip:], rms) * share
        if self._logits is None:
            return border, None
        tokens = len(rows) * (ids.shape[1] - 1)
        return border, self.cross_entropy(leaving, ids[list(piece)]) / tokens

    def gradients(
        self, borders: Borders, ids: Tensor, rows: Sequence[int], execution: Execution
    ) -> float:
        """The loss of some rows, whose gradients are put into `trained`."""
        settings, parameters = self.settings, list(self.trained.values())

        def of_piece(piece: Piece) -> Part:
            border, lm = self.part(borders, ids, rows, piece)
            loss = settings.kd_weight * border
            loss = loss if lm is None else loss + settings.lm_weight * lm
            # An expert that no token went to has none.
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            return loss, found

        def attempt(batch: int) -> tuple[list[float], list[Tensor]]:
            for parameter in parameters:
                parameter.grad = None
            running = Pieces(execution.ranks, self.model.device)
            return running.gradients(pieces_of(rows, batch), of_piece, parameters)

        (loss,), found = execution.halving(attempt)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        return loss

    def measure(
        self, borders: Borders, ids: Tensor, rows: Sequence[int], execution: Execution
    ) -> Losses:
        """Both losses over some rows."""

        def both(piece: Piece) -> Tensor:
            found = self.part(borders, ids, rows, piece)
            return torch.stack([loss for loss in found if loss is not None])

        def attempt(batch: int) -> list[float]:
            running = Pieces(execution.ranks, self.model.device)
            return running.losses(pieces_of(rows, batch), both)

        border, *lm = execution.halving(attempt)
        return Losses(border, lm[0] if lm else None)

    def _prepare(self, ids: Tensor) -> None:
        """Masks and rotary tables for rows of this length, which the embedding finds out."""
        if ids.shape[1] not in self._lengths:
            with self.model.runner.embedding(self.model.tensors(0)) as embed:
                embed(ids[:2])
            self._lengths.add(ids.shape[1])
