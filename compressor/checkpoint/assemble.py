"""From a work folder whose shards are complete to a finished checkpoint folder.

Each step may be repeated, and the manifest comes after everything it names: a process that dies
here leaves either no manifest, and the same command finishes, or a whole checkpoint. Whoever takes
up what another process left counts on no file that it has not hashed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compressor.checkpoint.durable import (
    is_file,
    make_folder,
    make_way,
    move,
    own_folder,
    write_atomically,
)
from compressor.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    hash_file,
    read_manifest,
)
from compressor.checkpoint.reader import INDEX_NAME
from compressor.checkpoint.records import Records
from compressor.checkpoint.shards import ShardLayout, ShardWriter
from compressor.checkpoint.side_files import side_files
from compressor.checkpoint.workspace import claim, require_same
from compressor.errors import CheckError, InputError, MachineError

RECIPE_NAME = "recipe.yaml"

STATED_NAME = "finishing.json"

FOUND = ("source.content", "environment")
"""What a manifest may say that is only known after the run."""


def finish(
    work: Path,
    output: Path,
    *,
    writer: ShardWriter,
    config: Mapping[str, Any],
    beside: Path,
    about: Mapping[str, Any],
    extra_files: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    recipe: bytes | None = None,
) -> Manifest:
    """Put a complete work folder's shards in place, and write everything beside them.

    config       config.json;  extra_files  other JSON files by name;  files  any others
    beside       folder whose side files are copied
    about        what the manifest says of how the artefact was made
    Raises MachineError where a file cannot be read or written; repeating it continues.
    """
    written = {INDEX_NAME: writer.layout.index(), "config.json": _json(config)}
    written |= {name: _json(value) for name, value in (extra_files or {}).items()}
    written |= files or {}
    if recipe is not None:
        written[RECIPE_NAME] = recipe
    try:
        for name in side_files(beside).carried:
            written.setdefault(name, (beside / name).read_bytes())
        for name, data in written.items():
            make_folder((output / name).parent)
            write_atomically(output / name, data)
        records = {name: hash_file(output / name) for name in written}
        for shard in writer.layout.shards:
            records[shard.file] = FileRecord(sha256=writer.file_hash(shard.file), size=shard.size)
        manifest = Manifest(files=records, tensors=writer.tensor_hashes(), about=dict(about))
        stated = {"hash": _hash(manifest)}
        Records(work, owner="finish").put(STATED_NAME, stated)
        write_atomically(work / MANIFEST_NAME, manifest.to_bytes())
        _move_all(work, output, [shard.file for shard in writer.layout.shards])
    except OSError as error:
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise MachineError(
            f"finishing {output} failed: {what}",
            hint="free some space or repair the disk; the same command continues",
        ) from error
    return manifest


def take_up(
    work: Path,
    output: Path,
    *,
    layout: ShardLayout,
    about: Mapping[str, Any],
    judged_later: bool = False,
) -> bool:
    """Whether `output` holds the finished checkpoint of this run. If not, `work` is claimed for it.

    Last renames that were interrupted are made up for, if every byte is there; otherwise the shards
    go back to the work folder, where each unit is checked by itself.
    judged_later  files of a finished checkpoint are about to be verified anyway
    Raises InputError for another run's folder, and CheckError for a finished checkpoint that is
    damaged, which names the files.
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
