"""The job, unit by unit: read, observe, apply the passes, encode, commit, make the next inputs.

Reading and hashing the next unit and writing the last one go on while a unit is worked on. What is
committed is not done again, once the source and the written bytes of each committed unit have been
held against their hashes: a resumed run replays the forward passes from the written files, with the
same batches, and so arrives at the same inputs bit for bit.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from compressor_calibration.tokens import TokenSet
from torch import Tensor

from compressor.checkpoint.background import CommitQueue
from compressor.checkpoint.shards import ShardWriter
from compressor.checkpoint.target import NONE
from compressor.errors import Interrupted
from compressor.ir.qtensor import QTensor
from compressor.ir.unit import Dequantized, Unit
from compressor.plan.plan import Plan
from compressor.plan.unit_plan import UnitPlan
from compressor.ranks.ranks import Ranks
from compressor.run.apply import Observe, ObserveSite, Tune, apply_passes
from compressor.run.environment import environment
from compressor.run.model_passes import Outcome
from compressor.run.observers import observer, observer_beside, observer_of_head, when_finite
from compressor.run.original import not_observed, rotated, start_of, values_of
from compressor.run.placing import placed
from compressor.run.reading import Reader
from compressor.run.settings import JobSettings, UnitDone
from compressor.run.source_content import SourceContent
from compressor.runner.block_runner import Block
from compressor.runner.expert_groups import experts_at_once
from compressor.runner.heap import settled
from compressor.runner.process_memory import peak_rss
from compressor.runner.rounds import every_row
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import Stream
from compressor.runner.sweep import Execution, Step, walk
from compressor.runner.tunable_block import TunableBlock


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a finished loop leaves: shards in the work folder, and the source's content hash.

    environments  what units were computed with; more than one where a run went on elsewhere
    """

    writer: ShardWriter
    source_hash: str
    units: tuple[UnitDone, ...]
    environments: tuple[Mapping[str, str], ...]


class _Worked(NamedTuple):
    """What becomes of a unit.

    own        its tensors on disk that this rank alone has;  others  those that all have
    coded      the codes that the former were made of, by linear
    rows       of the report
    originals  the original's weights, where the next unit's inputs come from them
    """

    own: dict[str, Tensor]
    others: dict[str, Tensor]
    rows: list[dict[str, Any]]
    originals: Mapping[str, Tensor]
    coded: Mapping[str, QTensor]


@dataclass(slots=True)
class Loop:
    """The walk over the units that are done in this process.

    records  of committed units, on every rank;  own  the units that are done here
    writing  the ranks that write a unit together: all, or each by itself where only the leading one
             may
    """

    plan: Plan
    tokens: TokenSet | None
    writer: ShardWriter
    settings: JobSettings
    learned: Mapping[int, Outcome]
    content: SourceContent
    reader: Reader
    records: dict[int, Mapping[str, Any]]
    own: Sequence[int]
    writing: Ranks
    originals: Stream | None = None
    targets: tuple[Stream, list[int]] | None = None  # the originals after a block that is tuned
    done: list[UnitDone] = field(default_factory=list)

    def run(self) -> None:
        """Do what is not committed yet."""
        plan, settings, ranks = self.plan, self.settings, self.settings.ranks
        here = environment(settings.device)
        # Asked by all ranks at once, so that all of them stop.
        agreed = replace(settings, stopping=lambda: ranks.any(settings.stopping()))
        self._check_sources(agreed)
        device, dtype = settings.device, plan.compute_dtype(settings.device)
        # What one rank found in the store and another ran would leave them apart.
        kept = settings.activations if ranks.world == 1 else None
        model = SourceModel(
            plan.source,
            device=device,
            dtype=dtype,
            activations=kept,
            experts=experts_at_once if settings.experts_apart else None,
            quick=plan.multiplies_bfloat16(device),
        )
        execution = Execution(
            settings.batch, offload=settings.offload, stopping=agreed.stopping, ranks=ranks
        )
        with settled(), CommitQueue(self.writer, settings.device, self.writing) as output:
            started = time.perf_counter()
            try:
                for step in walk([model], execution=execution, read=self._read, units=self.own):
                    record = self.records.get(step.index)
                    if step.unit is not None:
                        step.unit = self.reader.whole(step.index, step.unit)
                    if record is not None:
                        self._replay(step, record)
                        rows = record["rows"]
                    else:
                        worked = self._work(step)
                        rows = worked.rows
                        made = {
                            "source": self.content.hashes[step.index],
                            "rows": rows,
                            **self._next_inputs(step, worked),
                            "environment": here,
                        }
                        if (written := self._to_write(worked)) is not None:
                            output.put(step.index, written, made)
                        # The next unit is not to be worked on beside what is left of this one.
                        del worked, written
                    self._finished(step.index, rows, started, resumed=record is not None)
                    started = time.perf_counter()
            except Interrupted:
                output.drain()
                raise
            output.drain()

    def result(self) -> JobResult:
        """What is left once all units are done."""
        here = environment(self.settings.device)
        return JobResult(
            writer=self.writer,
            source_hash=self.content.whole,
            units=tuple(self.done),
            environments=tuple(
                self.records[index]["environment"] if index in self.records else here
                for index in range(len(self.plan.units))
            ),
        )

    def _check_sources(self, settings: JobSettings) -> None:
        """Read what the committed units were made from, also where nothing else reads it again."""
        before = {i: r["source"] for i, r in self.records.items() if i in self.own}
        self.content.look(before, settings)
        self.content.require(before)

    def _read(self, index: int) -> Unit | None:
        """A unit of the source; None where nothing needs it."""
        unit = self.plan.units[index]
        read_again = self._from_source(unit) or self._beside(unit)
        if index in self.records and not (self._feeds(index) and read_again):
            return None
        return self.reader.read(index)

    def _from_source(self, unit: UnitPlan) -> bool:
        """Whether the next unit's inputs come from the source's weights, not the written ones."""
        if unit.layout.kind == "embedding":
            return not unit.steps
        return self.plan.recipe.propagate == "original"

    def _beside(self, unit: UnitPlan) -> bool:
        """Whether the original block runs beside the quantized one."""
        return self.plan.two_streams and unit.layout.kind == "block"

    def _feeds(self, index: int) -> bool:
        """Whether a later unit that is still to be done needs the activations that leave this."""
        later = range(index + 1, len(self.plan.units))
        return any(self.plan.units[i].calibrated and i not in self.records for i in later)

    def _replay(self, step: Step, record: Mapping[str, Any]) -> None:
        """Make the inputs of the next unit from a committed one, exactly as it was done then."""
        unit, source = self.plan.units[step.index], step.unit
        if not self._feeds(step.index) or unit.layout.kind == "head":
            return
        if source is not None and self._from_source(unit):
            tensors = source.dequantized()
        else:
            written = self.settings.ranks.led(lambda: self.writer.read(unit.outputs))
            tensors = self._as_written(unit, written)
        if unit.layout.kind == "embedding":
            self._embed(step, tensors)
            return
        # In the batches of then: others may round otherwise.
        step.run(tensors=tensors, batches=self._own(record["batches"], step.stream))
        if self._beside(unit):
            assert source is not None and self.originals is not None
            moved, finite = placed(self.plan, unit, source, self.settings)
            finite.require()
            originals = self._rotated(step.index, source, moved)
            batches = self._own(record["original_batches"], self.originals)
            step.run(self.originals, tensors=originals, batches=batches)

    def _own(self, batches: Sequence[int], stream: Stream) -> list[int] | None:
        """This rank's part of the batches that a unit was run in, dealt out as rows are; None where
        memory had halved some and other ranks had other rows."""
        mine = list(batches[self.settings.ranks.rank :: self.settings.ranks.world])
        return mine if sum(mine) == stream.rows else None

    def _as_written(
        self,
        unit: UnitPlan,
        outputs: Mapping[str, Tensor],
        coded: Mapping[str, QTensor] = NONE,
    ) -> Mapping[str, Tensor]:
        """A unit's weights as the files say, rounding of every tensor included.

        coded  codes that were just made, by the name of the linear; their tensors may be missing
        """
        dtype = self.plan.compute_dtype(self.settings.device)
        ranks, device = self.settings.ranks, self.settings.brought_to
        decoded = self.plan.target.decode(unit.layout, outputs, coded=coded, ranks=ranks)
        return Dequantized(self.reader.own_of(decoded), dtype, device=device)

    def _next_inputs(self, step: Step, worked: _Worked) -> dict[str, list[int]]:
        """Make the inputs of the next unit, where one needs them, and return the batches."""
        unit = self.plan.units[step.index]
        if unit.layout.kind == "head" or not self._feeds(step.index):
            return {"batches": []}
        seen: Mapping[str, Tensor] = worked.originals
        if not self._from_source(unit):
            seen = self._as_written(unit, worked.own | worked.others, worked.coded)
        if unit.layout.kind == "embedding":
            self._embed(step, seen)
            return {"batches": []}
        batches = {"batches": self._dealt(step.run(tensors=seen))}
        if self._beside(unit):
            assert self.originals is not None
            if self.targets is None:
                ran = step.run(self.originals, tensors=worked.originals)
                batches["original_batches"] = self._dealt(ran)
            else:
                self.originals, batches["original_batches"] = self.targets
                self.targets = None
        return batches

    def _dealt(self, batches: list[int]) -> list[int]:
        """The batches of all ranks in the order of their rows."""
        every = self.settings.ranks.gather(batches)
        return [some[i] for i in range(max(map(len, every))) for some in every if i < len(some)]

    def _work(self, step: Step) -> _Worked:
        """What becomes of one unit."""
        unit, device, source = self.plan.units[step.index], self.settings.device, step.take()
        layout, (moved, finite) = unit.layout, placed(self.plan, unit, source, self.settings)
        # The next but one is read into this page-locked memory, which is free once all is done that
        # the GPU was asked to before it was given back: now, and not after the whole block.
        source = replace(source, tensors={}, quantized={})
        if layout.kind == "head" and self.plan.recipe.untie and self.plan.layout.tied:
            tied = self.plan.layout.tied
            shared = self.plan.source.checkpoint.read([tied])[tied].to(device)
            moved = {**moved, **{linear.weight_name: shared for linear in layout.linears}}
        original = self._rotated(step.index, source, moved)
        with ExitStack() as stack:
            look, look_beside, tune = self._observers(step, moved, original, stack)
            current, rows = apply_passes(
                self.plan,
                step.index,
                unit,
                start_of(self.plan, step.index, source, moved, self.learned, device=device),
                observe=when_finite(look, finite),
                observe_site=look_beside,
                tune=tune,
                progress=partial(self.settings.on_fit, layout.name),
                learned=values_of(self.learned),
                base=self.plan.target.base_weights(layout),
                ranks=self.settings.ranks,
                homes=self.reader.homes(step.index),
            )
        kept = original if self._from_source(unit) or self._beside(unit) else {}
        ranks = self.settings.ranks
        own, others = self.plan.target.encode_with(current, ranks=ranks)
        # The leading rank's decides of what is no one rank's; it alone keeps rows of the report.
        others = ranks.share(others)
        return _Worked(own, others, rows, kept, current.quantized)

    def _to_write(self, worked: _Worked) -> dict[str, Tensor] | None:
        """What this rank writes of a unit; None where another does."""
        if self.writing.world == self.settings.ranks.world:
            return worked.own | worked.others if self.writing.leads else worked.own
        own = {n: t for some in self.settings.ranks.gather(worked.own) for n, t in some.items()}
        return own | worked.others if self.settings.ranks.leads else None

    def _rotated(
        self, index: int, source: Unit, moved: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The original's weights in the basis that hidden states have in the written model."""
        unit = self.plan.units[index]
        if not self._beside(unit):
            return moved
        device = self.settings.device
        start = start_of(self.plan, index, source, moved, self.learned, device=device)
        dtype = self.plan.compute_dtype(device)
        return rotated(self.plan, index, start, self.learned, dtype=dtype) or moved

    def _observers(
        self,
        step: Step,
        tensors: Mapping[str, Tensor],
        rotated: Mapping[str, Tensor],
        stack: ExitStack,
    ) -> tuple[Observe, ObserveSite | None, Tune | None]:
        """What observes the unit, and where the original runs beside it, single sites of it; what
        runs its block with gradients. `tensors` are its weights before any pass, `rotated` the same
        where a pass rotates hidden states."""
        unit = self.plan.units[step.index]
        self.targets = None
        if not unit.calibrated:
            return not_observed, None, None
        if unit.layout.kind == "head":
            return observer_of_head(step, tensors), None, None
        block = stack.enter_context(step.loaded(tensors))
        every = self.plan.recipe.calibration.all_experts
        look = observer(step, block, all_experts=every)
        tune = self._tuner(step, block, rotated) if unit.tuned else None
        if not self._beside(unit):
            return look, None, tune
        assert self.originals is not None
        return look, observer_beside(step, block, self.originals), tune

    def _tuner(self, step: Step, block: Block, rotated: Mapping[str, Tensor]) -> Tune:
        """What runs a block with gradients towards what its original weights make."""
        block.load(rotated)
        stream, execution = step.stream, step.execution
        originals = self.originals or stream
        targets = originals.like()
        self.targets = targets, self._dealt(step.run(originals, into=targets))
        block.load(block.tensors)
        # A step draws from all rows.
        whole = [every_row(s, execution.batch, self.settings.ranks) for s in (stream, targets)]

        def tune(current: Unit) -> TunableBlock:
            return TunableBlock(
                block,
                current,
                inputs=whole[0],
                targets=whole[1],
                execution=execution,
                schemes=self.plan.schemes.linears,
            )

        return tune

    def _embed(self, step: Step, tensors: Mapping[str, Tensor]) -> None:
        assert self.tokens is not None
        ids = self.tokens.ids
        mine = self.settings.ranks.rows(ids.shape[0], step.execution.batch)
        step.embed(ids[mine or [0]], tensors=tensors)
        if not mine:  # more ranks than batches: this one only searches and rounds
            step.stream.hidden = step.stream.hidden[:0]
        if self.plan.two_streams:
            self.originals = step.stream.copy()

    def _finished(
        self,
        index: int,
        rows: list[dict[str, Any]],
        started: float,
        *,
        resumed: bool,
    ) -> None:
        device = self.settings.device
        done = UnitDone(
            name=self.plan.units[index].layout.name,
            index=index,
            total=len(self.plan.units),
            rows=tuple(rows),
            seconds=time.perf_counter() - started,
            peak_rss=peak_rss(),
            peak_device=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            resumed=resumed,
        )
        self.done.append(done)
        self.settings.on_unit(done)
