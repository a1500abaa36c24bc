"""From a work folder whose shards are complete to a finished checkpoint folder.

Each step may be repeated, and the manifest comes after everything it names: a process that dies
here leaves either no manifest, and the same command finishes, or a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.checkpoint import INDEX_NAME
from compressor.errors import MachineError
from compressor.manifest import MANIFEST_NAME, FileRecord, Manifest, hash_file
from compressor.shards import ShardWriter, sync_folder, write_atomically
from compressor.side_files import side_files

RECIPE_NAME = "recipe.yaml"


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
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(output / name, data)
        records = {name: hash_file(output / name) for name in written}
        for shard in writer.layout.shards:
            records[shard.file] = FileRecord(sha256=writer.file_hash(shard.file), size=shard.size)
        manifest = Manifest(files=records, tensors=_tensor_hashes(writer), about=dict(about))
        write_atomically(work / MANIFEST_NAME, manifest.to_bytes())
        resume_finish(work, output)
    except OSError as error:
        raise MachineError(
            f"finishing {output} failed: {error.strerror or error}",
            hint="free some space or repair the disk; the same command continues",
        ) from error
    return manifest


def resume_finish(work: Path, output: Path) -> None:
    """The last steps: shards move, then the manifest, then the work folder goes."""
    shards = work / "shards"
    if (work / MANIFEST_NAME).is_file():
        for path in sorted(shards.glob("*.safetensors")):
            os.replace(path, output / path.name)
        sync_folder(output)
        os.replace(work / MANIFEST_NAME, output / MANIFEST_NAME)
        sync_folder(output)
    if (output / MANIFEST_NAME).is_file() and work.is_dir():
        shutil.rmtree(work)


def _tensor_hashes(writer: ShardWriter) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for path in sorted(writer.records.glob("*.json")):
        hashes |= json.loads(path.read_bytes())["tensors"]
    planned = {name for shard in writer.layout.shards for name in shard.tensors}
    assert set(hashes) == planned, f"not committed: {sorted(planned ^ set(hashes))[:4]}"
    return hashes


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
