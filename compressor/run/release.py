"""From a compiled checkpoint to one that can be trusted: verdict, report, card, publishing.

Everything here stands outside the manifest: it carries times, and limits that may change. A run
that finds its checkpoint finished judges it again, unless nothing has changed since (`standing`).
"""

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from compressor.checkpoint.manifest import MANIFEST_NAME, hash_file, read_manifest
from compressor.methods.sparda.choice_record import read_record
from compressor.ranks.ranks import ALONE, Ranks
from compressor.report.card import CardData, source_metadata, write_card
from compressor.report.data import (
    HTML_NAME,
    Costs,
    ReportData,
    UnitReport,
    read_report,
    write_report,
)
from compressor.report.notes import row_notes
from compressor.run.by_size import find_mixes, find_peers
from compressor.run.environment import versions
from compressor.run.judge import Unwatched, Verdict, Watch, judge
from compressor.run.portable import portable
from compressor.run.session import Compiled, Prepared
from compressor.run.standing import Standing, sealed
from compressor.run.tokens import skipped_notes
from compressor.runner.process_memory import peak_rss


@dataclass(frozen=True, slots=True)
class Released:
    """What came of a compiled checkpoint.

    units       what happened in each unit, also where an earlier run compiled it
    host_bytes  largest resident size of the run, of what judges the checkpoint too
    report      path of report.html, or None where the recipe wants none
    card_kept   a model card that somebody wrote by hand is there, and was not replaced
    since       when the verdict was found, if an earlier run found it
    """

    verdict: Verdict
    units: tuple[UnitReport, ...]
    host_bytes: int
    report: Path | None
    card_kept: bool = False
    since: str | None = None


def conclude(
    prepared: Prepared,
    compiled: Compiled,
    *,
    seconds: float,
    before: Standing | None = None,
    watch: Watch | None = None,
    ranks: Ranks = ALONE,
) -> Released:
    """Judge a compiled checkpoint as its recipe says, and write its report and card.

    seconds  wall time of the run so far
    before   the verdict of an earlier run, which is taken as it is, and its report with it
    ranks    that judge it together: this is the leading one, the others call `judge`
    Raises MachineError where a file cannot be written.
    """
    watch = watch or Unwatched()
    started = datetime.now(UTC)
    units = unit_reports(compiled)
    if before is not None:
        written = write_card(compiled.output, card_data(prepared, compiled, before.verdict))
        return Released(
            verdict=before.verdict,
            units=units,
            host_bytes=host_peak(compiled),
            report=compiled.output / HTML_NAME,
            card_kept=not written,
            since=before.since,
        )
    unjudged = report_data(prepared, compiled, Verdict(), units, started, seconds=seconds)
    if prepared.recipe.report and not compiled.already:
        # Written before the verdict too, since only this process knows what the passes found.
        write_report(compiled.output, unjudged)
    rows = [row for unit in units for row in unit.rows]
    verdict = judge(prepared, compiled, rows=rows, watch=watch, ranks=ranks)
    released = Released(verdict, units, host_peak(compiled), report=None)
    if not prepared.recipe.report:
        return released
    data = report_data(prepared, compiled, verdict, units, started, seconds=seconds)
    _, page = write_report(compiled.output, sealed(data, prepared, compiled.output))
    written = write_card(compiled.output, card_data(prepared, compiled, verdict))
    return replace(released, report=page, card_kept=not written)


def unit_reports(compiled: Compiled) -> tuple[UnitReport, ...]:
    """The units of this run, or those that an earlier run's report tells of."""
    if compiled.units:
        fields = UnitReport.model_fields
        return tuple(
            UnitReport(**{name: getattr(unit, name) for name in fields}) for unit in compiled.units
        )
    before = read_report(compiled.output)
    return () if before is None else before.units


def _learned(compiled: Compiled) -> tuple[dict[str, Any], ...]:
    """What passes of this run say of what they learned, or those that an earlier run's report tells
    of."""
    if compiled.already:
        before = read_report(compiled.output)
        return () if before is None else before.learned
    found = compiled.learned.values()
    rows = [{"pass": one.name, **row} for one in found for row in one.result.rows]
    return (*([] if compiled.selected is None else [dict(compiled.selected)]), *rows)


def audits_json(compiled: Compiled, verdict: Verdict) -> dict[str, Any]:
    """Audits by what was looked at: the model, by this run or the earlier one; what was written."""
    found = {"model": compiled.audit, "written": verdict.audit}
    made = {what: audit.to_json() for what, audit in found.items() if audit is not None}
    if compiled.already and (before := read_report(compiled.output)) is not None:
        made = {**before.audit, **made}
    return made


def host_peak(compiled: Compiled) -> int:
    """Largest resident size so far in bytes; of the earlier run where this one only judges."""
    if not compiled.already:
        return peak_rss()
    before = read_report(compiled.output)
    return 0 if before is None else before.spent.host_bytes


def report_data(
    prepared: Prepared,
    compiled: Compiled,
    verdict: Verdict,
    units: tuple[UnitReport, ...],
    started: datetime,
    *,
    seconds: float,
) -> ReportData:
    """Everything a report says of a run."""
    plan, planned = prepared.plan, prepared.estimates
    manifest = read_manifest(compiled.output)
    about = manifest.about if manifest else {}
    choices = read_record(compiled.output)
    source = dict(about.get("source", prepared.located.identity))
    notes = [*plan.notes, *skipped_notes(prepared.calibration, prepared.evaluation)]
    if any(unit.resumed for unit in units):
        notes.append("the run was interrupted and continued: times of resumed units are of that")
    if len(about.get("environment", ())) > 1:
        said = [" ".join(f"{k}={v}" for k, v in here.items()) for here in about["environment"]]
        notes.append(
            "the run went on in another environment, which may round otherwise: "
            + ", then ".join(said)
        )
    notes += row_notes(row for unit in units for row in unit.rows)
    return ReportData(
        title=compiled.output.resolve().name,
        recipe=portable(prepared.recipe),
        source=source,
        format=plan.target.format.name,
        parameters=parameters(prepared),
        units=units,
        learned=_learned(compiled),
        estimates=Costs(**{k: v for k, v in asdict(planned).items() if k in Costs.model_fields}),
        spent=Costs(
            source_bytes=planned.source_bytes,
            output_bytes=plan.shards.size,
            host_bytes=host_peak(compiled),
            device_bytes=max((unit.peak_device for unit in units), default=0),
            seconds=sum(unit.seconds for unit in units),
        ),
        phases={} if compiled.already else {"compress": seconds, **verdict.seconds},
        verify=None if verdict.verified is None else verdict.verified.to_json(),
        evaluation=None if verdict.evaluation is None else verdict.evaluation.to_json(),
        passkey=None if verdict.passkey is None else verdict.passkey.to_json(),
        choices=None if choices is None else choices.to_json(),
        tasks=verdict.tasks_json(),
        gate=None if verdict.gate is None else verdict.gate.to_json(),
        peers=find_peers(compiled.output, source, verdict.evaluation),
        mixes=find_mixes(compiled.output, plan.layout.linears, plan.schemes.linears),
        audit=audits_json(compiled, verdict),
        warnings=tuple(notes),
        versions=dict(about.get("versions", versions())),
        hashes=_hashes(compiled.output, about),
        machine=_machine(prepared.device),
        environment=tuple(about.get("environment", ())),
        activations=activations_json(prepared),
        started=started.isoformat(timespec="seconds"),
    )


def activations_json(prepared: Prepared) -> dict[str, int] | None:
    """What the activation store saved."""
    store = prepared.activations
    return None if store is None else {"read": store.read, "ran": store.ran}


def card_data(prepared: Prepared, compiled: Compiled, verdict: Verdict) -> CardData:
    """Everything a card says."""
    recipe, identity = prepared.recipe, prepared.located.identity
    inherited = source_metadata(prepared.located.source.checkpoint.folder)
    if recipe.card.license is not None:
        inherited["license"] = recipe.card.license
    name = compiled.output.resolve().name
    return CardData(
        title=name,
        repository=recipe.publish.repo if recipe.publish else name,
        base_model=recipe.card.base_model or (identity["name"] if "revision" in identity else None),
        inherited=inherited,
        format=prepared.plan.target.format.name,
        schemes=prepared.plan.schemes,
        recipe=portable(recipe),
        source_bytes=prepared.estimates.source_bytes,
        output_bytes=prepared.plan.shards.size,
        evaluation=None if verdict.evaluation is None else verdict.evaluation.to_json(),
        passkey=None if verdict.passkey is None else verdict.passkey.to_json(),
        tasks=verdict.tasks_json(),
        verified=None if verdict.verified is None else verdict.verified.ok,
    )


def parameters(prepared: Prepared) -> int | None:
    """Weights of the source, a tied head counted once; None where they are packed."""
    if prepared.located.source.quantized:
        return None
    entries = prepared.located.source.checkpoint.entries
    return sum(math.prod(entry.spec.shape) for entry in entries.values())


def _hashes(output: Path, about: Mapping[str, Any]) -> dict[str, str]:
    found = {MANIFEST_NAME: hash_file(output / MANIFEST_NAME).sha256}
    if about.get("tokens"):
        found["calibration tokens"] = str(about["tokens"])
    return found


def _machine(device: torch.device) -> dict[str, str]:
    """What the run had to work with; no name that tells whose machine it is."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processors": str(psutil.cpu_count() or 1),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
    }
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    return found
