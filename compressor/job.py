"""The one loop: read a unit, observe it, apply the passes, encode, commit, make the next inputs.

Reading and hashing the next unit and writing the last one go on while a unit is worked on. What is
committed is never redone: a resumed run replays the committed units' forward passes from the
written files, with the same batches, and so arrives at the same inputs bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from compressor_calibration.stats import SiteStats
from compressor_calibration.tokens import TokenSet
from torch import Tensor

from compressor.checkpoint import content_hash
from compressor.commit_queue import CommitQueue
from compressor.encode import decode_unit, encode_unit
from compressor.errors import InputError, MachineError
from compressor.layout import UnitLayout
from compressor.passes.base import PassContext, Unit
from compressor.plan import Plan, UnitPlan
from compressor.runner import BlockRunner, Observation
from compressor.shards import ShardWriter


@dataclass(frozen=True, slots=True)
class UnitDone:
    """Progress: one more unit is finished.

    rows         what the passes report of its linears
    seconds      wall time of this unit
    peak_rss, peak_device  bytes, of the process so far
    resumed      it was committed by an earlier run
    """

    name: str
    index: int
    total: int
    rows: tuple[Mapping[str, Any], ...]
    seconds: float
    peak_rss: int
    peak_device: int
    resumed: bool = False


class Interrupted(Exception):
    """The run was asked to stop; what is committed stays and the same command continues."""


@dataclass(slots=True)
class JobSettings:
    """How this machine runs a job.

    batch     rows of calibration tokens in one forward pass; halved when memory runs out
    on_unit   called after each unit
    stopping  asked between units whether to stop
    """

    device: torch.device
    batch: int
    on_unit: Callable[[UnitDone], None] = lambda done: None
    stopping: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a finished loop leaves: shards in the work folder, and the source's content hash."""

    writer: ShardWriter
    source_hash: str
    units: tuple[UnitDone, ...]


def run_units(plan: Plan, tokens: TokenSet | None, work: Path, settings: JobSettings) -> JobResult:
    """Run the plan's units into `work`, continuing after what is committed there.

    Raises InputError for a source that is not finite or has changed, MachineError where memory or
    disk fail, Interrupted when asked to stop.
    """
    writer = ShardWriter(plan.shards, work)
    try:
        writer.open()
        return _Loop(plan=plan, tokens=tokens, writer=writer, settings=settings).run()
    except OSError as error:
        raise MachineError(
            f"writing {work} failed: {error.strerror or error}",
            hint="free some space or repair the disk; the same command continues",
        ) from error
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the device ran out of memory with one row at a time",
            hint="use a shorter calibration.length, or a larger device; the same command continues",
        ) from error


@dataclass(slots=True)
class _Loop:
    plan: Plan
    tokens: TokenSet | None
    writer: ShardWriter
    settings: JobSettings
    runner: BlockRunner | None = None
    hidden: Tensor | None = None
    done: list[UnitDone] = field(default_factory=list)
    source_hashes: list[str] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)

    def run(self) -> JobResult:
        plan, units = self.plan, self.plan.units
        self.committed = {i for i in range(len(units)) if self.writer.record(i) is not None}
        with (
            ThreadPoolExecutor(1) as reads,
            ThreadPoolExecutor(1) as writes,
            ThreadPoolExecutor(1) as syncs,
        ):
            ahead = reads.submit(self._read, 0)
            output = CommitQueue(self.writer, writes, syncs)
            if plan.calibrated:
                self.runner = BlockRunner(
                    plan.source.checkpoint.config,
                    plan.source.arch.runtime,
                    device=self.settings.device,
                    dtype=plan.compute_dtype(self.settings.device),
                )
            for index, unit in enumerate(units):
                if self.settings.stopping():
                    output.drain()
                    raise Interrupted
                started = time.perf_counter()
                source = ahead.result()
                if index + 1 < len(units):
                    ahead = reads.submit(self._read, index + 1)
                if index in self.committed:
                    record = self.writer.record(index)
                    assert record is not None
                    self._replay(index, unit, source, record)
                    self._finished(index, unit, record["rows"], started, resumed=True)
                    continue
                assert source is not None
                tensors, digest = source
                self.source_hashes.append(digest)
                outputs, rows, originals = self._work(index, unit, tensors)
                batches = self._next_inputs(index, unit, outputs, originals)
                output.put(index, outputs, {"source": digest, "rows": rows, "batches": batches})
                self._finished(index, unit, rows, started)
            output.drain()
        digest = hashlib.sha256("\n".join(self.source_hashes).encode()).hexdigest()
        return JobResult(writer=self.writer, source_hash=digest, units=tuple(self.done))

    def _read(self, index: int) -> tuple[Unit, str] | None:
        """A unit of the source and the hash of its content; None where nothing needs it."""
        unit = self.plan.units[index]
        if index in self.committed and not (self._feeds(index) and self._from_source(unit.layout)):
            return None
        pin = self.settings.device.type == "cuda"
        names = self.plan.source.names(unit.layout)
        raw = self.plan.source.checkpoint.read(names, pin=pin)
        return self.plan.source.assemble(unit.layout, raw), content_hash(raw)

    def _from_source(self, unit: UnitLayout) -> bool:
        return unit.kind == "embedding" or self.plan.recipe.propagate == "original"

    def _feeds(self, index: int) -> bool:
        """Whether a later unit that is still to be done needs the activations that leave this."""
        later = range(index + 1, len(self.plan.units))
        return any(self.plan.units[i].needs and i not in self.committed for i in later)

    def _replay(
        self,
        index: int,
        unit: UnitPlan,
        source: tuple[Unit, str] | None,
        record: Mapping[str, Any],
    ) -> None:
        """Make the inputs of the next unit from a committed one, exactly as it was done then."""
        self.source_hashes.append(record["source"])
        if source is not None and source[1] != record["source"]:
            raise InputError(
                f"{unit.layout.name} of the source is not what the interrupted run read",
                hint="restore the source, or start anew in another folder",
            )
        if not self._feeds(index) or unit.layout.kind == "head":
            return
        if unit.layout.kind == "embedding":
            assert source is not None
            self._embed(source[0].dequantized())
            return
        if source is not None:
            tensors = source[0].dequantized()
        else:
            tensors = self._as_written(unit, self.writer.read(unit.outputs))
        self._advance(unit.layout, tensors, record["batches"])

    def _as_written(self, unit: UnitPlan, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A unit's weights as the files say, rounding of every tensor included."""
        dtype = self.plan.compute_dtype(self.settings.device)
        return decode_unit(self.plan, unit, outputs).dequantized(dtype)

    def _next_inputs(
        self,
        index: int,
        unit: UnitPlan,
        outputs: Mapping[str, Tensor],
        originals: Mapping[str, Tensor],
    ) -> list[int]:
        """Make the inputs of the next unit, where one needs them, and return the batches."""
        if unit.layout.kind != "block" or not self._feeds(index):
            return []
        seen = originals or self._as_written(unit, outputs)
        return self._advance(unit.layout, seen, None)

    def _work(
        self, index: int, unit: UnitPlan, source: Unit
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, Tensor]]:
        """One unit's output tensors, its report rows, and the original weights where the next
        unit's inputs are to come from them."""
        layout, device = unit.layout, self.settings.device
        dtype = self.plan.compute_dtype(device)
        moved = {n: t.to(device, non_blocking=True) for n, t in source.dequantized(dtype).items()}
        require_finite(moved)
        if layout.kind == "embedding" and self._feeds(index):
            self._embed(moved)
        if layout.kind == "head" and self.plan.recipe.untie and self.plan.layout.tied:
            tied = self.plan.layout.tied
            shared = self.plan.source.checkpoint.read([tied])[tied].to(device)
            moved |= {f"{linear.name}.weight": shared for linear in layout.linears}
        rows: list[dict[str, Any]] = []
        if unit.needs and layout.kind == "block":
            assert self.runner is not None
            with self.runner.block(layout, moved) as block:
                observed = self._halving(
                    lambda batch: block.observe(self._inputs, needs=unit.needs, batch=batch)
                )
                current = self._passes(index, unit, _whole(source, moved), observed, rows)
        else:
            stats: dict[str, SiteStats] = {}
            if unit.needs:
                assert self.runner is not None
                (site,) = unit.needs
                stats[site] = self.runner.head_stats(moved, self._inputs, needs=unit.needs[site])
            observed = Observation(stats=stats, module_loss=_no_module_loss)
            current = self._passes(index, unit, _whole(source, moved), observed, rows)
        originals = moved if self.plan.recipe.propagate == "original" else {}
        return encode_unit(self.plan, unit, current), rows, originals

    @property
    def _inputs(self) -> Tensor:
        assert self.hidden is not None
        return self.hidden

    def _passes(
        self,
        index: int,
        unit: UnitPlan,
        current: Unit,
        observed: Observation,
        rows: list[dict[str, Any]],
    ) -> Unit:
        for number in unit.steps:
            step = self.plan.passes[number]
            context = PassContext(
                stats=observed.stats,
                schemes=self.plan.schemes.linears,
                selected=tuple(x for x in unit.layout.linears if x.name in step.names),
                module_loss=observed.module_loss,
                seed=unit_seed(self.plan.recipe.seed, index, number),
            )
            result = step.step.params.apply(current, context)
            current = result.unit
            rows.extend({"pass": step.step.name, **row} for row in result.rows)
        return current

    def _embed(self, tensors: Mapping[str, Tensor]) -> None:
        assert self.runner is not None and self.tokens is not None
        self.hidden = self.runner.embed(tensors, self.tokens.ids, batch=self.settings.batch)

    def _advance(
        self, layout: UnitLayout, tensors: Mapping[str, Tensor], batches: list[int] | None
    ) -> list[int]:
        """Run all rows through a block, in place, and return the batches it took.

        Rows are replaced as soon as they are done, so that running out of memory loses nothing;
        the batches are recorded because other batches may round otherwise.
        """
        assert self.runner is not None
        used: list[int] = []
        rows, start = self._inputs, 0
        with self.runner.block(layout, tensors) as block:
            while start < rows.shape[0]:
                if batches is not None:
                    size = batches[len(used)]
                    out = block.forward(rows[start : start + size])
                else:
                    size = min(self.settings.batch, rows.shape[0] - start)
                    try:
                        out = block.forward(rows[start : start + size])
                    except torch.OutOfMemoryError:
                        self._halve()
                        continue
                rows[start : start + size] = out.to(rows.dtype)
                used.append(size)
                start += size
        return used

    def _halving(self, attempt: Callable[[int], Observation]) -> Observation:
        while True:
            try:
                return attempt(self.settings.batch)
            except torch.OutOfMemoryError:
                self._halve()

    def _halve(self) -> None:
        if self.settings.batch == 1:
            raise
        self.settings.batch //= 2
        torch.cuda.empty_cache()

    def _finished(
        self,
        index: int,
        unit: UnitPlan,
        rows: list[dict[str, Any]],
        started: float,
        *,
        resumed: bool = False,
    ) -> None:
        device = self.settings.device
        done = UnitDone(
            name=unit.layout.name,
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


def _whole(source: Unit, moved: Mapping[str, Tensor]) -> Unit:
    """A unit in float32, as passes work on it."""
    tensors = {name: tensor.float() for name, tensor in moved.items()}
    return Unit(layout=source.layout, tensors=tensors, extra=source.extra)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError naming the tensors that hold NaN or an infinity."""
    # The largest magnitude is finite exactly where all values are; NaN counts as the largest.
    flags = {
        name: torch.isfinite(torch.stack(list(torch.aminmax(tensor))).float()).all()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    if flags and not bool(torch.stack(list(flags.values())).all()):
        bad = [name for name, good in flags.items() if not bool(good)]
        raise InputError(
            f"the source holds NaN or infinity in {', '.join(bad[:4])}",
            hint="the checkpoint is damaged: download it again, or take another revision",
        )


def unit_seed(seed: int, unit: int, step: int) -> int:
    """A seed of its own for each unit and pass, so that redoing one gives the same bytes."""
    digest = hashlib.sha256(f"{seed}/{unit}/{step}".encode()).digest()
    return int.from_bytes(digest[:6], "little")


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        with open("/proc/self/status") as status:
            lines = [line for line in status if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024
    except (OSError, IndexError):
        return int(psutil.Process(os.getpid()).memory_info().rss)


def _no_module_loss(site: str, weights: Mapping[str, Tensor]) -> float:
    raise AssertionError(f"{site} was not observed")
