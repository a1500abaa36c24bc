"""Scale distillation: the scales of all deltas, trained on the fine-tune's logits.

BitDelta (arXiv 2402.10193), section 3.1: signs and base stay as they are, and the mean squared
difference of the logits to the fine-tune's is minimised by AdamW under a cosine. Every weight of
the student is built as base + scales * signs while its block runs, so gradients take the delta's
way through the model as well as the base's (the reference's product has no backward, so there they
take the base's only), and again in the backward pass, so that no block's dense weights are kept.
Rows of calibration tokens are many enough that a dense product costs less than one with signs.
Only scales are trained, and norms where they are asked for; the reference's optimiser also gets
embeddings and the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from compressor.arch.load import RuntimeNames
from compressor.errors import Interrupted
from compressor.ir.layout import UnitLayout, weight_name
from compressor.methods.common.context import LearnContext
from compressor.methods.common.training_state import keep_state, resume_state
from compressor.numerics.bitdelta import merge, sign_delta
from compressor.runner.pieces import Part, Piece, Pieces, pieces_of
from compressor.runner.source_model import SourceModel

OWN_LR = 0.03
NORM_LR = 1e-4
KEEP_EVERY = 20
"""Steps between two records of the training's state."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Steps, rows of tokens in one, and the learning rate that falls from `lr` to 0.

    Adam moves every scale by about the learning rate in a step, however small the scale: where
    `lr` is None, it is OWN_LR of the median initial scale, and NORM_LR for norms.
    norms  whether the norms of blocks with deltas are trained too
    """

    steps: int
    batch: int
    lr: float | None
    norms: bool = False


@dataclass(frozen=True, slots=True)
class Trained:
    """Scales [bits] by module path, trained norms by tensor name; the loss on the first batch
    before and after training."""

    scales: Mapping[str, Tensor]
    before: float
    after: float
    norms: Mapping[str, Tensor] = field(default_factory=dict)


def distill(
    model: SourceModel, context: LearnContext, ids: Tensor, *, bits: int, settings: Settings
) -> Trained:
    """Train the scales of every linear for which the context has a weight of the base.

    ids  token ids [rows, length]; step s takes the next `batch` rows, from the start again at the
    end, which ranks share. A killed run continues at the last record in `context.scratch`.
    """
    student = Student(model, context.base, bits=bits, norms=settings.norms)
    if not student.rows:  # the base has every weight
        return Trained(scales={}, before=0.0, after=0.0)
    try:
        scales = student.scales
        top = settings.lr
        if top is None:
            top = max(OWN_LR * float(scales.detach()[:, 0].median()), 1e-12)
        groups = [{"params": [scales], "lr": top}]
        if student.norms:
            kept = {"params": list(student.norms.values()), "lr": settings.lr or NORM_LR}
            groups.append({**kept, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups)
        highest = [group["lr"] for group in optimizer.param_groups]
        running = Pieces(context.ranks, model.device)

        def pieces(step: int) -> list[Piece]:
            first = step * settings.batch
            rows = [i % ids.shape[0] for i in range(first, first + settings.batch)]
            return pieces_of(rows, context.batch)

        def loss(piece: Piece) -> Tensor:
            return student.loss(ids[torch.tensor(piece)]) * (len(piece) / settings.batch)

        parameters = list(student.trained.values())

        def of_piece(piece: Piece) -> Part:
            part = loss(piece)
            return part, torch.autograd.grad(part, parameters)

        (first,) = running.losses(pieces(0), loss)
        done, state = resume_state(context.scratch, optimizer, student.trained)
        before = float(state.get("before", first))
        for step in range(done, settings.steps):
            for group, most in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = most * (1 + math.cos(math.pi * step / settings.steps)) / 2
            _, gradients = running.gradients(pieces(step), of_piece, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            stop = context.stops()
            if stop or (step + 1) % KEEP_EVERY == 0:
                kept_loss = torch.tensor([before], dtype=torch.float64)
                keep_state(context.scratch, optimizer, student.trained, step + 1, before=kept_loss)
            context.progress("distill", step + 1, settings.steps)
            if stop:
                raise Interrupted
        (after,) = running.losses(pieces(0), loss)
        trained = {name: scales[row].detach().cpu() for name, row in student.rows.items()}
        norms = {name: norm.detach().cpu() for name, norm in student.norms.items()}
        return Trained(scales=trained, before=before, after=after, norms=norms)
    finally:
        student.close()


class Student:
    """The whole fine-tune whose blocks can also run with base + scales * signs.

    scales  float32 [linears, bits];  rows  module path → its row
    norms   tensors of norms that are trained too, float32, by name
    """

    def __init__(
        self,
        model: SourceModel,
        base: Callable[[int], Mapping[str, Tensor]],
        *,
        bits: int,
        norms: bool = False,
    ) -> None:
        self.device = model.device
        self.names: RuntimeNames = model.runner.names
        self.whole: nn.Module = model.whole()
        self.merging = False
        self.rows: dict[str, int] = {}
        self.head: dict[str, _Part] = {}
        self.norms: dict[str, nn.Parameter] = {}
        self._layers = self.whole.get_submodule(self.names.layers)
        initial: list[Tensor] = []
        for index, unit in enumerate(model.layout.units):
            weights = base(index)
            if not weights:
                continue
            tensors = model.tensors(index)
            parts: dict[str, _Part] = {}
            for linear in unit.linears:
                name = linear.weight_name
                if name in weights:
                    before = weights[name].to(self.device)
                    fine = tensors.pop(name)
                    delta = sign_delta(fine.float() - before.float(), bits=bits)
                    self.rows[linear.name] = len(initial)
                    parts[name] = _Part(before.to(fine.dtype), delta.signs, len(initial))
                    initial.append(delta.scales)
            if unit.kind == "block":
                names = unit.norm_tensors if norms else ()
                self.norms |= {name: nn.Parameter(tensors[name].float()) for name in names}
                layer = self._layers[unit.index]  # type: ignore[index]
                self._layers[unit.index] = _Merging(self, unit, layer, tensors, parts)  # type: ignore[index,operator]
            elif unit.kind == "head":
                self.head = parts
        scales = torch.stack(initial) if initial else torch.zeros(0, bits)
        self.scales = nn.Parameter(scales.to(self.device, torch.float32))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that is trained, by the name under which a record keeps it."""
        return {"scales": self.scales, **self.norms}

    def close(self) -> None:
        """Take the student's blocks out of the model again."""
        for index, layer in enumerate(self._layers):  # type: ignore[arg-type]
            if isinstance(layer, _Merging):
                self._layers[index] = layer.layer  # type: ignore[index,operator]

    def weight(self, part: _Part) -> Tensor:
        """A weight of the student, with a gradient for its scales."""
        return merge(part.base, part.signs, self.scales[part.row], part.base.dtype)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean squared difference of the logits to the fine-tune's, over all positions."""
        ids = ids.to(self.device)
        with torch.no_grad():
            wanted = self.logits(ids, merging=False)
        return (self.logits(ids, merging=True) - wanted).square().mean()

    def logits(self, ids: Tensor, *, merging: bool) -> Tensor:
        """Logits [rows, length, vocabulary] in float32, of the student or the fine-tune."""
        self.merging = merging
        state = {}
        if merging and self.head:
            (part,) = self.head.values()
            state = {weight_name(self.names.lm_head): self.weight(part)}
        try:
            out: Any = functional_call(
                self.whole, state, kwargs={"input_ids": ids, "use_cache": False}
            )
        finally:
            self.merging = False
        logits: Tensor = out.logits
        return logits.float()


@dataclass(frozen=True, slots=True)
class _Part:
    """A delta in memory: the base's weight, packed signs, and the row of its scales."""

    base: Tensor
    signs: Tensor
    row: int


class _Merging(nn.Module):
    """A decoder layer that runs with its own weights, or with the student's."""

    def __init__(
        self,
        student: Student,
        unit: UnitLayout,
        layer: nn.Module,
        rest: Mapping[str, Tensor],
        parts: Mapping[str, _Part],
    ) -> None:
        super().__init__()
        self.layer = layer
        self.student = student
        self.unit = unit
        self.rest = rest
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        """The model asks a layer for its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.student.merging:
            return self.layer(*args, **kwargs)
        return checkpoint(self._merged, *args, use_reentrant=False, **kwargs)

    def _merged(self, *args: Any, **kwargs: Any) -> Any:
        merged = {name: self.student.weight(part) for name, part in self.parts.items()}
        for name, norm in self.student.norms.items():
            if name in self.rest:
                merged[name] = norm.to(self.rest[name].dtype)
        state = self.student.names.block_state(self.unit, {**self.rest, **merged})
        return functional_call(self.layer, state, args, kwargs)
