"""Runs a plan's units: all of them with all ranks, or, where no rows run through them, each rank
its own, which then reads, rounds, packs and writes by itself."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compressor_calibration.tokens import TokenSet

from compressor.checkpoint.shards import ShardWriter
from compressor.checkpoint.transaction import disk_errors
from compressor.checkpoint.workspace import require_no_writer, writing_beside
from compressor.errors import Interrupted, MachineError
from compressor.plan.plan import Plan
from compressor.plan.shares import output_bytes
from compressor.plan.spread import spread_units
from compressor.ranks.ranks import ALONE, Ranks
from compressor.run.ahead import Ahead
from compressor.run.loop import JobResult, Loop
from compressor.run.model_passes import Outcome
from compressor.run.one_host import on_one_host
from compressor.run.reading import Reader
from compressor.run.settings import JobSettings
from compressor.run.source_content import SourceContent


def run_units(
    plan: Plan,
    tokens: TokenSet | None,
    work: Path,
    settings: JobSettings,
    *,
    owner: str,
    content: SourceContent,
    learned: Mapping[int, Outcome],
) -> JobResult:
    """Run the plan's units into `work`, continuing after what is committed there.

    owner    what all that is committed has to be made from: the run and what was learned
    content  the source, where some of it has been read already
    learned  what model passes found, by the index of the pass
    Raises InputError for a source that is not finite or has changed, and while ranks of a run that
    was ended still write; MachineError where memory or disk fail, Interrupted when asked to stop.
    """
    ranks = settings.ranks
    try:
        with disk_errors(f"writing {work}"), ExitStack() as stack:
            one_host = on_one_host(work, ranks)
            # Where no rows run through the units, each is one rank's.
            apart = ranks.world > 1 and one_host and not any(u.calibrated for u in plan.units)
            writer = ShardWriter(plan.shards, work, owner=owner, alone=not apart)
            records = ranks.led(lambda: _take_up(writer, work, plan, settings))
            if one_host and not ranks.leads:
                stack.enter_context(writing_beside(work))
            own: Sequence[int] = range(len(plan.units))
            if apart:
                settings = replace(settings, ranks=ALONE)
                own = ranks.mine(own, lambda i: output_bytes(plan.units[i]))
            spread = spread_units(plan, ranks.world) if settings.spread and not apart else None
            reader = Reader(
                plan,
                content,
                settings.device,
                settings.ranks,
                spread=spread or frozenset(),
                apart=settings.experts_apart,
                ahead=Ahead(settings.device) if settings.ahead else None,
            )
            writing = settings.ranks if one_host else ALONE
            loop = Loop(
                plan, tokens, writer, settings, learned, content, reader, records, own, writing
            )
            if apart:
                _run_apart(loop, ranks)
            else:
                loop.run()
            return loop.result()
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the device ran out of memory with one row at a time",
            hint="use a shorter calibration.length, or a larger device; the same command continues",
        ) from error


def _take_up(
    writer: ShardWriter, work: Path, plan: Plan, settings: JobSettings
) -> dict[int, Mapping[str, Any]]:
    """What an interrupted run recorded of the units that it committed."""
    require_no_writer(work)
    for name in writer.open(settings.check_stop):
        settings.on_note(f"units/{name} or what it tells of is damaged: the unit is done again")
    found = {index: writer.record(index) for index in range(len(plan.units))}
    return {index: record for index, record in found.items() if record is not None}


def _run_apart(loop: Loop, ranks: Ranks) -> None:
    """Run this rank's units, and learn of those of the others."""
    stopped = False
    try:
        loop.run()
    except Interrupted:
        stopped = True
    if ranks.any(stopped):
        raise Interrupted
    every = ranks.gather((loop.content.hashes, loop.done))
    for hashes, _ in every:
        for index, digest in hashes.items():
            loop.content.note(index, digest)
    loop.done = sorted((unit for _, done in every for unit in done), key=lambda unit: unit.index)
    loop.writer.join(ranks)
