"""The verdict of an earlier run, where nothing that it is of has changed since."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compressor.attention.policy import POLICY_NAME
from compressor.checkpoint.manifest import MANIFEST_NAME, hash_file, read_manifest
from compressor.checkpoint.reader import POLICY_TENSORS
from compressor.checkpoint.records import stated_hash
from compressor.checkpoint.side_files import DECIDING
from compressor.errors import InputError
from compressor.plan.recipe import AFTERWARDS
from compressor.report.data import HTML_NAME, ReportData, read_report
from compressor.run.judge import Verdict
from compressor.run.portable import portable
from compressor.run.session import Prepared
from compressor.run.settings import JobSettings, Progress
from compressor.run.source_content import SourceContent
from compressor.verify.checks.hashes import FileHashes
from compressor.verify.compare_config import deciding_files
from compressor.verify.findings import Findings

_VERDICT = TypeAdapter(Verdict)
BESIDE = (*DECIDING, POLICY_NAME, POLICY_TENSORS)
"""Files of a source beside its weights and config that a verdict looks at."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A verdict that every check passed, and when that was found out (ISO 8601)."""

    verdict: Verdict
    since: str


def sealed(data: ReportData, prepared: Prepared, output: Path) -> ReportData:
    """A report with the seal by which a later run knows that it tells of the same."""
    return data.model_copy(update={"seal": _seal(data, prepared, output)})


def standing(
    prepared: Prepared, output: Path, *, progress: Progress = lambda name, done, total: None
) -> Standing | None:
    """What the report of a finished checkpoint says of it, if it still holds: the report is the one
    that a run wrote of this recipe, its text and its source, all of which passed, and every file of
    the checkpoint and every tensor of the source has the hash that it had.

    None otherwise, and where the hashes do not say it all: documents of tasks and what an audit is
    of are looked at anew.
    """
    recipe, report = prepared.recipe, read_report(output)
    tasks = recipe.evaluate is not None and recipe.evaluate.tasks
    audited = recipe.audit is not None and recipe.audit.looks_at("written")
    if report is None or tasks or audited or not (output / HTML_NAME).is_file():
        return None
    if report.seal != _seal(report, prepared, output):
        return None
    try:
        told = report.model_dump(include={"evaluation", "passkey", "gate"})
        verified = report.verify and {"folder": str(output), **report.verify}
        verdict = _VERDICT.validate_python({**told, "verified": verified})
    except ValidationError:  # a figure that is none, such as an infinite perplexity
        return None
    if not verdict.ok or not _same_files(output) or not _same_source(prepared, output, progress):
        return None
    return Standing(verdict, report.started)


def _seal(data: ReportData, prepared: Prepared, output: Path) -> str:
    """A hash of what a report says, and of what decides it: the manifest names the source's tensors
    and config, the recipe, the versions and the device."""
    said = data.to_json()
    del said["seal"]
    recipe = portable(prepared.recipe)
    source = prepared.plan.source.checkpoint.folder
    beside = sorted(deciding_files(source, BESIDE))
    about: dict[str, Any] = {
        "said": said,
        "beside": {name: hash_file(source / name).sha256 for name in beside},
        "manifest": hash_file(output / MANIFEST_NAME).sha256,
        "judged": {key: recipe[key] for key in AFTERWARDS if key in recipe},
        "evaluation": prepared.evaluation.sha256 if prepared.evaluation else None,
        "haystack": prepared.haystack,
    }
    return stated_hash(about)


def _same_files(output: Path) -> bool:
    """Whether all files are those of the manifest, and no other is there that loaders take."""
    found = Findings()
    FileHashes(output, found).finish()
    return all(check.ok for check in found.checks)


def _same_source(prepared: Prepared, output: Path, progress: Progress) -> bool:
    """Whether every tensor of the source is the one that was read."""
    manifest = read_manifest(output)
    source = manifest.about.get("source", {}) if manifest is not None else {}
    content = SourceContent(prepared.plan)
    settings = JobSettings(prepared.device, prepared.batch, on_step=progress)
    try:
        content.look(range(len(prepared.plan.units)), settings)
    except InputError:
        return False
    return bool(content.whole == source.get("content"))
