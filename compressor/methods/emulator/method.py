"""Offsite-Tuning: a model with fewer blocks, on which its first and last ones are tuned for it.

Xiao, Lin, Han, "Offsite-Tuning: Transfer Learning without Full Model" (arXiv 2302.04870). The
emulator keeps some blocks of the middle, evenly apart, and may be trained towards what the whole
middle makes of the same inputs. It is a model like any other; `compress plug` puts the blocks that
were tuned on it into the full model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.checkpoint.find import name_folder
from compressor.checkpoint.kept_blocks import whole_source
from compressor.checkpoint.offsite import OFFSITE_NAME, OffsiteRecord, check_pads, fingerprint
from compressor.checkpoint.source import Source
from compressor.checkpoint.transaction import json_bytes
from compressor.errors import InputError
from compressor.ir.unit import Unit
from compressor.methods.base import Cost, Effects, ModelPass, Needs
from compressor.methods.common.context import (
    LearnContext,
    LearnResult,
    PassContext,
    PassResult,
    PlanContext,
)
from compressor.methods.common.learned import Learned
from compressor.methods.emulator.distillation import Distill, distill, held_out
from compressor.methods.emulator.given import given_middle
from compressor.runner.kept_blocks import check_kinds, with_blocks
from compressor.runner.source_model import SourceModel


class Middle(Learned):
    """Weights of the blocks between the pads, by the names of their units; none where they are the
    full model's."""

    tensors_by_name: dict[str, Tensor] = Field(default_factory=dict)


class Emulator(ModelPass[Middle]):
    """Keep the first and last blocks and some of those between them, as a model of its own.

    offsite.json records which, and by what the full model is known; `compress plug` reads it.
    """

    version: ClassVar[int] = 2

    pads: tuple[int, int] = Field(
        (2, 2), description="how many of the first and of the last blocks are kept to be tuned"
    )
    keep: int | list[int] = Field(
        8,
        description="blocks of the middle that are kept: how many, evenly apart, or their numbers",
    )
    distill: Distill | None = Field(
        None, description="train them towards what the whole middle makes; null leaves them"
    )
    student: str | None = Field(
        None,
        description="weights for them in place of the model's own: a student.pt of the published "
        "code, or the same as safetensors",
    )
    unpickle: bool = Field(
        False,
        description="load `student` though it is a pickle: tensors alone, in a process of "
        "its own with limits; only from whom you trust",
    )

    @model_validator(mode="after")
    def _one_middle(self) -> Self:
        if self.student is not None and self.distill is not None:
            raise ValueError("student gives the middle's weights, distill trains them: keep one")
        if isinstance(self.keep, int) and self.keep < 1:
            raise ValueError("keep at least one block of the middle")
        return self

    @property
    def middle(self) -> Literal["kept", "distilled", "given"]:
        """Where the weights between the pads come from."""
        if self.student is not None:
            return "given"
        return "kept" if self.distill is None else "distilled"

    def kept(self, blocks: int) -> tuple[int, ...]:
        """Numbers of the blocks that are kept, of so many. Raises InputError."""
        bottom, top = self.pads
        try:
            check_pads(blocks, self.pads)
        except ValueError as error:
            raise InputError(f"{error}", hint="pads: [2, 2] are the published ones") from error
        inside = range(bottom, blocks - top)
        if isinstance(self.keep, int):
            if self.keep > len(inside):
                raise InputError(
                    f"keep: {self.keep} blocks, but between pads of {bottom} and {top} there are "
                    f"{len(inside)} of {blocks}",
                    hint=f"keep at most {len(inside)}",
                )
            middle = evenly(len(inside), self.keep)
            return (*range(bottom), *(bottom + i for i in middle), *range(blocks - top, blocks))
        wrong = [i for i in self.keep if i not in inside]
        if wrong or sorted(set(self.keep)) != self.keep or not self.keep:
            raise InputError(
                f"keep: {self.keep} are not ascending numbers of blocks between the pads",
                hint=f"the middle of {blocks} blocks is {bottom} to {blocks - top - 1}",
            )
        return (*range(bottom), *self.keep, *range(blocks - top, blocks))

    def reads(self, source: Source) -> Source:
        """The blocks that are kept."""
        return with_blocks(source, self.kept(len(source.layout.blocks)))

    def try_model(self, source: Source) -> None:
        whole = whole_source(source)
        if whole.arch.runtime.handed:
            raise InputError(
                f"blocks of {whole.arch.model_type} read what earlier ones hand to them beside "
                "hidden states, and an emulator leaves some out"
            )
        check_kinds(whole, source, self.kept(len(whole.layout.blocks)))

    def effects(self) -> Effects:
        other = self.middle != "kept"
        return Effects(works_on="all" if other else "none", retrains_blocks=other)

    def needs(self) -> Needs:
        return Needs(tokens=self.distill is not None)

    def check(self, context: PlanContext) -> Iterable[InputError]:
        """Rows are there to train on and to measure on; the student's file is there."""
        if self.student is not None and not Path(self.student).expanduser().is_file():
            yield InputError(f"student: there is no file {self.student}")
        if self.distill is not None and context.rows < 2:
            yield InputError(
                "distill holds rows of calibration tokens out to measure on, and has only "
                f"{context.rows}",
                hint="raise calibration: samples",
            )

    def cost(self, context: PlanContext, dtype: torch.dtype) -> Cost:
        if self.distill is None:
            return Cost()
        blocks = context.layout.blocks
        sizes = [sum(x.out_features * x.in_features for x in unit.linears) for unit in blocks]
        bottom, top = self.pads
        trained, above = sum(sizes[bottom : len(sizes) - top]), sum(sizes[len(sizes) - top :])
        hidden, vocabulary = context.layout.sizes.hidden, context.layout.sizes.vocabulary
        lm = self.distill.lm_weight > 0
        tokens = self.distill.batch * context.length
        # A master in float32 with two moments, the gradient's sum and a piece of it, and its copy
        # that runs.
        memory = (20 + 2 * dtype.itemsize) * trained
        memory += (
            dtype.itemsize * (above + hidden * vocabulary) + 12 * tokens * vocabulary if lm else 0
        )
        active = trained + (above + hidden * vocabulary if lm else 0)
        return Cost(
            memory=memory,
            scratch=2 * context.rows * context.length * hidden * dtype.itemsize + 12 * trained,
            flops=6.0 * self.distill.steps * tokens * active,
        )

    def divides(self, *, one_host: bool) -> bool:
        return one_host and self.distill is not None

    def learn(self, model: SourceModel, context: LearnContext) -> LearnResult[Middle]:
        """The weights between the pads, and the record of the full model."""
        whole = whole_source(model.source)
        blocks = len(whole.layout.blocks)
        record = OffsiteRecord(
            base="@".join(name_folder(whole.checkpoint.folder).values()),
            model_type=whole.layout.model_type,
            blocks=blocks,
            pads=self.pads,
            kept=self.kept(blocks),
            fingerprint=context.ranks.led(
                lambda: fingerprint(whole, self.pads, progress=context.progress)
            ),
            middle=self.middle,
        )
        files = {OFFSITE_NAME: json_bytes(record.to_json())}
        units = model.layout.blocks[self.pads[0] : len(record.kept) - self.pads[1]]
        if self.student is not None:
            path = Path(self.student).expanduser()
            given = given_middle(path, model.source, units, unpickle=self.unpickle)
            return LearnResult(Middle(tensors_by_name=given), files=files)
        if self.distill is None:
            return LearnResult(Middle(), files=files)
        teacher = SourceModel(
            whole, device=model.device, dtype=model.dtype, activations=model.activations
        )
        found = distill(teacher, model, context, pads=self.pads, units=units, settings=self.distill)
        row: Mapping[str, Any] = {
            "linear": "middle",
            "loss_before": found.before.border,
            "loss_after": found.after.border,
            "lm_before": found.before.lm,
            "lm_after": found.after.lm,
            "rows": len(held_out(context.ids.shape[0])),
        }
        return LearnResult(Middle(tensors_by_name=dict(found.tensors)), rows=[row], files=files)

    def apply(self, unit: Unit, context: PassContext, learned: Middle) -> PassResult:
        """The block with the weights that were found for it."""
        own = {n: learned.tensors_by_name[n] for n in unit.tensors if n in learned.tensors_by_name}
        device = next(iter(unit.tensors.values())).device
        return PassResult(unit.with_tensors({n: t.to(device).float() for n, t in own.items()}))


def evenly(blocks: int, keep: int) -> list[int]:
    """`keep` of so many blocks, evenly apart with both ends; halves go to the even number, as in
    the published code. A single one is the centre, for which that code divides by zero."""
    if keep == 1:
        return [(blocks - 1) // 2]
    return [round(i * (blocks - 1) / (keep - 1)) for i in range(keep)]
