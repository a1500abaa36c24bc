"""A verdict on the files of a checkpoint: reopen them, trust nothing, name what is damaged.

Nothing is taken from the run that wrote them. A checkpoint without a manifest, written by others,
gets every check but that of its hashes. Memory is one unit; beside a GPU the next one is read
meanwhile.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.manifest import MANIFEST_NAME
from compressor.checkpoint.offsite import OffsiteRecord, read_offsite_record
from compressor.checkpoint.reader import INDEX_NAME
from compressor.checkpoint.source import Source, open_source
from compressor.errors import InputError, Problems
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.execution import Progress
from compressor.runner.kept_blocks import with_blocks
from compressor.verify.apart import Apart
from compressor.verify.checks.attention_policy import AttentionPolicy
from compressor.verify.checks.attention_quality import AttentionQuality
from compressor.verify.checks.base import Check
from compressor.verify.checks.base_of_delta import BaseOfDelta
from compressor.verify.checks.codes import Codes
from compressor.verify.checks.declared import check_declared
from compressor.verify.checks.finite import Finite
from compressor.verify.checks.forecasts import Forecasts
from compressor.verify.checks.hashes import FileHashes, TensorHashes
from compressor.verify.checks.headers import Headers
from compressor.verify.checks.kernels import Kernels
from compressor.verify.checks.original import Original
from compressor.verify.checks.stream_policy import StreamPolicy
from compressor.verify.elsewhere import Elsewhere, has_room
from compressor.verify.findings import Findings, NothingMore, VerifyReport
from compressor.verify.kernels.check import enable_interpreter
from compressor.verify.subject import Subject, kind_of
from compressor.verify.walk import walk

CHECKS: tuple[type[Check], ...] = (
    Headers,
    AttentionPolicy,
    StreamPolicy,
    TensorHashes,
    BaseOfDelta,
    Finite,
    Codes,
    Kernels,
    Original,
    Forecasts,
    AttentionQuality,
)
"""In the order of the report."""


def verify(
    folder: Path,
    *,
    base: str | Source | None = None,
    against: Path | Source | None = None,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    apart: Apart | None = None,
) -> VerifyReport:
    """Check a checkpoint folder; `against` is the original that its layers are compared with,
    `base` a delta's, if not the recorded one. All `ranks`, which share the units, get the report.

    apart  a process that makes the comparison with the original meanwhile, for one rank alone

    Raises InputError where there is no checkpoint to read, a base is named for what is no delta,
    or `against` is none.
    """
    _require_checkpoint(folder)
    kind = kind_of(folder)
    if base is not None and kind is Subject:
        raise InputError(f"{folder} is not a delta, so it needs no base")
    if device.type == "cpu":
        enable_interpreter()
    original = open_source(against) if isinstance(against, Path) else against
    original = None if original is None else _as_read(original, read_offsite_record(folder))
    found = Findings()
    files = FileHashes(folder, found, ranks)
    check_declared(folder, files.manifest, found)
    asked: dict[str, Any] = {"manifest": files.manifest, "original": original}
    asked |= {"device": device, "seed": seed, "ranks": ranks}
    checks: list[Check] = []
    elsewhere: Elsewhere | None = None
    wrong: InputError | None = None
    try:
        subject = kind.open(folder, base, **asked)
        checks = [check(subject, found) for check in CHECKS]
        if apart is not None and original is not None:
            if has_room(subject):
                elsewhere = Elsewhere(subject, found, apart)
                checks = [elsewhere if type(check) is Original else check for check in checks]
            else:
                apart.end()
    except InputError as error:
        wrong = error
    ranks.agree(2 * len(checks) + (files.manifest is None), f"what {folder} holds")
    whole = wrong is None
    if wrong is not None:
        problems = wrong.problems if isinstance(wrong, Problems) else [wrong]
        found.add(kind.opened, [p.message for p in problems], "")
    else:
        try:
            walk(subject, checks, found, progress)
            if elsewhere is not None:
                elsewhere.join(checks)
        except NothingMore:
            whole = False
    files.finish()
    return ranks.led(lambda: _concluded(folder, checks, found)) if whole else found.report(folder)


def _concluded(folder: Path, checks: list[Check], found: Findings) -> VerifyReport:
    with suppress(NothingMore):
        for check in checks:
            check.conclude()
    return found.report(folder)


def _as_read(original: Source, record: OffsiteRecord | None) -> Source:
    """The blocks of the original that an emulator holds; itself for anything else."""
    if record is None or len(original.layout.blocks) != record.blocks:
        return original
    kept = record.kept
    return original if len(kept) == record.blocks else with_blocks(original, kept)


def _require_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", hint="name a checkpoint's folder")
    signs = ("config.json", MANIFEST_NAME, INDEX_NAME)
    if not any((folder / name).is_file() for name in signs) and not any(
        folder.glob("*.safetensors")
    ):
        raise InputError(f"{folder} holds no checkpoint", hint="name a checkpoint's folder")
