"""The output folder while a run owns it: one writer, one fingerprint, nothing overwritten.

Until the run has finished, everything it wrote lies in a hidden folder inside the output folder.
"""

import errno
import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.checkpoint.durable import in_the_way, make_folder, opened, own_folder
from compressor.checkpoint.manifest import MANIFEST_NAME
from compressor.checkpoint.records import Records
from compressor.errors import InputError, MachineError

WORK_NAME = ".compress-work"
JOB_NAME = "job.json"


def refusal(output: Path, *, models: Iterable[Path] = ()) -> InputError | None:
    """Why a run may not write into a folder: it is a file, holds what no run of ours wrote, cannot
    be written into, or lies in the folder of one of the models that are read, where it would be
    taken for files of that."""
    for model in models:
        if output.resolve().is_relative_to(model.resolve()):
            return InputError(
                f"{output} lies in the folder of the model ({model})",
                hint="name a folder elsewhere with --output",
            )
    inside = output / WORK_NAME
    if (why := in_the_way(inside)) is not None:
        return InputError(f"cannot write {output}: {why}", hint="name a folder with --output")
    try:
        names = {path.name for path in output.iterdir()} if output.exists() else set()
    except OSError as error:
        return InputError(f"cannot read {output}: {error.strerror or error}")
    if names and WORK_NAME not in names and MANIFEST_NAME not in names:
        return InputError(
            f"{output} is not empty and holds no run of this program ({min(names)} is there)",
            hint="name a new folder with --output; nothing is ever overwritten",
        )
    return None


def lacking_room(output: Path, needed: int, *, scratch: int = 0) -> InputError | None:
    """An error where a checkpoint of `needed` bytes does not fit into `output`, or what a pass
    keeps while it learns, which is gone before the checkpoint is written. What an interrupted run
    has written there is not written again."""
    folder = output
    while not folder.exists():
        folder = folder.parent
    there = [*output.glob("*"), *(output / WORK_NAME).rglob("*")]
    # Blocks, not sizes: shards have their full size before they are filled.
    taken = sum(512 * path.lstat().st_blocks for path in there)
    free = shutil.disk_usage(folder).free + taken
    if needed * 1.02 > free:
        return InputError(
            f"the checkpoint takes {_size(needed)}; {folder} has {_size(free)} left",
            hint="free some space, or write elsewhere with --output",
        )
    if scratch * 1.02 > free:
        return InputError(
            f"learning keeps {_size(scratch)} of activations; {folder} has {_size(free)} left",
            hint="fewer or shorter rows (calibration.samples, calibration.length), or another "
            "disk with --output",
        )
    return None


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


@contextmanager
def owned(output: Path) -> Iterator[Path]:
    """The work folder of `output`, locked against a second run for the length of a `with`.

    Raises InputError where the folder holds something that no run of ours wrote.
    """
    if (refused := refusal(output)) is not None:
        raise refused
    try:
        make_folder(output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise InputError(f"cannot create {output}: {error.strerror or error}") from error
    with opened(output) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run is writing into {output}", hint="wait for it, or write elsewhere"
            ) from None
        except OSError as error:
            raise MachineError(
                f"cannot lock {output}: {error.strerror or error}",
                hint="its file system has no locks, which keep two runs apart: write to another "
                "disk with --output",
            ) from error
        if (refused := refusal(output)) is not None:
            raise refused
        yield output / WORK_NAME


def require_no_writer(work: Path) -> None:
    """Raises InputError while ranks of a run whose leading one has ended may still write."""
    own_folder(work)
    try:
        with opened(work) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"ranks of a run that was ended still write into {work.parent}",
            hint="they end within a minute; then the same command continues",
        ) from None


@contextmanager
def writing_beside(work: Path) -> Iterator[None]:
    """Keeps another run from writing for the length of a `with`, though the leading rank, which has
    locked the output, may have ended."""
    with opened(work) as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def claim(work: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write the run's fingerprint, or compare it with the one that is there.

    A damaged one is written again: what else lies there is sealed with the run that made it.
    Raises InputError with the keys that differ.
    """
    own_folder(work)
    records = Records(work, owner="job")
    before = records.get(JOB_NAME)
    if before is None:
        records.put(JOB_NAME, fingerprint)
    else:
        require_same(before, fingerprint, where=work.parent)


def require_same(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    where: Path,
    known_later: tuple[str, ...] = (),
) -> None:
    """Raises InputError where two fingerprints differ, with each key and both values.

    known_later  keys that `before` may have beside those of `now`
    """
    old, new = dict(_flat(before)), dict(_flat(json.loads(json.dumps(now))))
    later = {key for key in old if key not in new and key.startswith(known_later)}
    differing = [k for k in sorted({*old, *new} - later) if old.get(k) != new.get(k)]
    if differing:
        changed = all(key.startswith("source.") for key in differing)
        mend = "restore the model's files" if changed else "repeat that run's command"
        lines = [f"{key}: {_short(old.get(key))}, now {_short(new.get(key))}" for key in differing]
        raise InputError(
            f"{where} belongs to a run that differs in " + "; ".join(lines),
            hint=f"{mend} to continue it, or write elsewhere with --output",
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{number}")
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"
