"""One checkpoint from a claimed folder to a finished one; recipes, conversions and applied deltas
are written so.

Each step may be repeated, and the manifest comes after everything it names: a process that dies
here leaves either no manifest, and the same command finishes, or a whole checkpoint. Whoever takes
up what another process left counts on no file that it has not hashed.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.background import CommitQueue
from compressor.checkpoint.container import ShardLayout, lay_out
from compressor.checkpoint.durable import (
    is_file,
    make_folder,
    make_way,
    move,
    own_folder,
    write_atomically,
)
from compressor.checkpoint.manifest import (
    DECLARED,
    MANIFEST_NAME,
    RECIPE_NAME,
    FileRecord,
    Manifest,
    declared,
    hash_file,
    read_manifest,
)
from compressor.checkpoint.records import Records, stated_hash
from compressor.checkpoint.shards import ShardWriter
from compressor.checkpoint.side_files import side_files
from compressor.checkpoint.target import Target
from compressor.checkpoint.workspace import claim, lacking_room, owned, refusal, require_same
from compressor.errors import CheckError, InputError, MachineError
from compressor.ir.layout import UnitLayout
from compressor.ir.unit import Unit

STATED_NAME = "finishing.json"

FOUND = ("source.content", "environment", "selected", DECLARED)
"""What a manifest may say that is only known after the run."""

MENDS = {
    errno.EFBIG: "raise the limit on a file's size (ulimit -f), or that of the file system",
    errno.EROFS: "mount the file system for writing",
    errno.EACCES: "give this user permission to write there",
    errno.EPERM: "give this user permission to write there",
}
"""What helps against an error of the disk, where it is no lack of space."""

CPU = torch.device("cpu")

Read = Callable[[UnitLayout], Unit]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Transaction:
    """A checkpoint on its way into `output`, by way of the work folder `work`.

    documents  files that hold no tensor, of which all is known
    about      what decides its bytes, for the fingerprint and the manifest
    finished   whether it was finished before this began
    """

    output: Path
    work: Path
    shards: ShardLayout
    documents: Mapping[str, bytes]
    about: Mapping[str, Any]
    finished: bool

    def finish(
        self,
        writer: ShardWriter,
        *,
        beside: Path | None,
        recipe: bytes | None = None,
        files: Mapping[str, bytes] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Put complete shards in place, and write everything beside them.

        beside   folder whose side files are copied, if any;  files  any others
        about    what the manifest says, where more is known now
        Raises MachineError where a file cannot be read or written; repeating it continues.
        """
        written = {**self.documents, **(files or {})}
        if recipe is not None:
            written[RECIPE_NAME] = recipe
        said = {**(about or self.about), DECLARED: declared(written)}
        with disk_errors(f"finishing {self.output}"):
            if beside is not None:
                for name in side_files(beside).carried:
                    written.setdefault(name, (beside / name).read_bytes())
            for name, data in written.items():
                make_folder((self.output / name).parent)
                write_atomically(self.output / name, data)
            records = {name: hash_file(self.output / name) for name in written}
            for shard in self.shards.shards:
                digest = writer.file_hash(shard.file)
                records[shard.file] = FileRecord(sha256=digest, size=shard.size)
            manifest = Manifest(records, writer.tensor_hashes(), said)
            Records(self.work, owner="finish").put(STATED_NAME, {"hash": _hash(manifest)})
            write_atomically(self.work / MANIFEST_NAME, manifest.to_bytes())
            _move_all(self.work, self.output, [shard.file for shard in self.shards.shards])
        return manifest


@contextmanager
def writing(
    target: Target,
    output: Path,
    *,
    about: Mapping[str, Any],
    shards: ShardLayout,
    judged_later: bool = False,
) -> Iterator[Transaction]:
    """The one way to write a checkpoint: a new folder, or one that the same write began.

    shards        where its tensors lie (`container.lay_out`)
    judged_later  files of a finished checkpoint are about to be verified anyway
    Raises InputError for a folder that holds anything else, and CheckError for a finished
    checkpoint that is damaged, which names the files.
    """
    config = target.config()
    json_files = {**({"config.json": config} if config else {}), **target.files()}
    documents = {**shards.index, **{name: json_bytes(value) for name, value in json_files.items()}}
    with owned(output) as work:
        finished = _take_up(work, output, layout=shards, about=about, judged_later=judged_later)
        yield Transaction(output, work, shards, documents, about, finished)


def write(
    target: Target,
    output: Path,
    read: Read,
    *,
    about: Mapping[str, Any],
    beside: Path | None,
    models: Iterable[Path] = (),
    device: torch.device = CPU,
    recipe: bytes | None = None,
    files: Mapping[str, bytes] | None = None,
    content: Callable[[UnitLayout], str] | None = None,
    progress: Progress = lambda name, done, total: None,
) -> Transaction:
    """Write units one after the other as `read` gives them; the same call continues.

    The last one is hashed and written while the next one is read.
    models   folders that are read, beside `beside`
    device   where `read` puts what is coded
    files    in place of the target's, or beside them
    content  hash of what a unit is made from, where `about` does not say it: what is committed, or
             finished, has to be made from the same
    Raises what `writing` does, InputError where the disk has no room or a value no form, and
    MachineError where the disk fails.
    """

    def said() -> Mapping[str, Any]:
        if content is None:
            return about
        whole = stated_hash({unit.name: content(unit) for unit in target.units})
        return {**about, "source": {**about["source"], "content": whole}}

    shards = lay_out(target.container, map(target.shapes, target.units))
    along = 0 if beside is None else side_files(beside).size(beside)
    for refused in (
        refusal(output, models=[*models, *filter(None, [beside])]),
        lacking_room(output, shards.size + along),
    ):
        if refused is not None:
            raise refused
    with writing(target, output, about=about, shards=shards) as under_way:
        if under_way.finished:
            if content is not None and (made := read_manifest(output)) is not None:
                require_same(made.about, said(), where=output, known_later=(DECLARED,))
            return under_way
        writer = ShardWriter(under_way.shards, under_way.work, owner=stated_hash(about))
        with disk_errors(f"writing {under_way.work}"):
            writer.open()
            with CommitQueue(writer, device) as queue:
                for index, unit in enumerate(target.units):
                    before = writer.record(index)
                    if before is None:
                        tensors = target.encode(read(unit))
                        seen = {} if content is None else {"source": content(unit)}
                        queue.put(index, tensors, seen)
                        del tensors  # the queue has them
                    elif content is not None and before["source"] != content(unit):
                        raise InputError(
                            f"{unit.name} of the source is not what was read of it before",
                            hint="restore the source, or start anew in another folder",
                        )
                    progress(unit.name, index + 1, len(target.units))
                queue.drain()
        under_way.finish(writer, beside=beside, recipe=recipe, files=files, about=said())
    return under_way


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Errors of the disk as MachineErrors."""
    try:
        yield
    except OSError as error:
        why = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        mend = MENDS.get(error.errno or 0, "free some space or repair the disk")
        raise MachineError(
            f"{what} failed: {why}", hint=f"{mend}; the same command continues"
        ) from error


def _take_up(
    work: Path,
    output: Path,
    *,
    layout: ShardLayout,
    about: Mapping[str, Any],
    judged_later: bool,
) -> bool:
    """Whether `output` holds the finished checkpoint of this run. If not, `work` is claimed for it.

    Last renames that were interrupted are made up for, if every byte is there; otherwise the shards
    go back to the work folder, where each unit is checked by itself.
    """
    begun = work.is_dir()
    stated = Records(work, owner="finish").get(STATED_NAME)
    finished = _manifest(output, begun=begun, stated=stated)
    if finished is not None:
        require_same(finished.about, about, where=output, known_later=FOUND)
        wrong = [] if judged_later and not begun else _damaged(finished, output)
        if wrong and not begun:
            raise CheckError(
                f"{output} is damaged: not as its manifest says: {', '.join(wrong)}",
                hint="restore these files, or delete the folder and run the same command again",
            )
        if not wrong:
            if begun:
                shutil.rmtree(work)
            return True
    claim(work, about)
    own_folder(work / "shards")
    planned = [shard.file for shard in layout.shards]
    half = None if stated is None else _manifest(work, begun=True, stated=stated)
    if half is not None and _same(half, about) and not _damaged(half, work / "shards", output):
        _move_all(work, output, planned)
        return True
    if half is not None or finished is not None:
        for file in planned:
            if is_file(output / file) and not is_file(work / "shards" / file):
                make_way(work / "shards" / file)
                move(output / file, work / "shards" / file)
    for folder in (work, output):
        make_way(folder / MANIFEST_NAME)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
    return False


def _manifest(folder: Path, *, begun: bool, stated: Mapping[str, str] | None) -> Manifest | None:
    """A folder's manifest. While the run is `begun`, one that is damaged, or is not the one that
    was `stated` when it was written, is as if it were not there."""
    if begun and not is_file(folder / MANIFEST_NAME):
        return None
    try:
        found = read_manifest(folder)
    except InputError:
        if not begun:
            raise
        return None
    if found is not None and stated is not None and stated["hash"] != _hash(found):
        return None
    return found


def _hash(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.to_bytes()).hexdigest()


def _same(manifest: Manifest, about: Mapping[str, Any]) -> bool:
    try:
        require_same(manifest.about, about, where=Path(), known_later=FOUND)
    except InputError:
        return False
    return True


def _damaged(manifest: Manifest, *folders: Path) -> list[str]:
    """Files that are in none of the folders as the manifest says."""
    wrong = []
    for name, record in manifest.files.items():
        path = next((f / name for f in folders if is_file(f / name)), None)
        if path is None or hash_file(path) != record:
            wrong.append(name)
    return wrong


def _move_all(work: Path, output: Path, files: Iterable[str]) -> None:
    """The last steps: shards move, then the manifest, then the work folder goes."""
    for file in files:
        if is_file(work / "shards" / file):
            move(work / "shards" / file, output / file)
    move(work / MANIFEST_NAME, output / MANIFEST_NAME)
    shutil.rmtree(work)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
