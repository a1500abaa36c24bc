"""From a work folder whose shards are complete to a finished checkpoint folder.

Each step may be repeated, and the manifest comes after everything it names: a process that dies
here leaves either no manifest, and the same command finishes, or a whole checkpoint.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.checkpoint import INDEX_NAME
from compressor.manifest import MANIFEST_NAME, FileRecord, Manifest, record_file
from compressor.shards import ShardWriter, write_atomically

RECIPE_NAME = "recipe.yaml"

SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "attention_policy.*",
)
"""Files of the source that travel with the weights; nothing else of it is copied."""


def finish(
    work: Path,
    output: Path,
    *,
    writer: ShardWriter,
    config: Mapping[str, Any],
    side_files: Path,
    about: Mapping[str, Any],
    extra_files: Mapping[str, Any] | None = None,
    recipe: bytes | None = None,
) -> Manifest:
    """Put a complete work folder's shards in place, and write everything beside them.

    config       config.json;  extra_files  other JSON files by name
    side_files   folder whose tokenizer, templates and licence are copied
    about        what the manifest says of how the artefact was made
    """
    files: dict[str, FileRecord] = {}
    for shard in writer.layout.shards:
        files[shard.file] = FileRecord(sha256=writer.file_hash(shard.file), size=shard.size)
    tensors: dict[str, str] = {}
    for path in sorted(writer.records.glob("*.json")):
        tensors |= json.loads(path.read_bytes())["tensors"]
    written = {INDEX_NAME: writer.layout.index(), "config.json": _json(config)}
    written |= {name: _json(value) for name, value in (extra_files or {}).items()}
    if recipe is not None:
        written[RECIPE_NAME] = recipe
    for path in sorted(side_files.iterdir()):
        kept = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in SIDE_FILES)
        if kept and path.is_file() and path.name not in written:
            written[path.name] = path.read_bytes()
    for name, data in written.items():
        write_atomically(output / name, data)
        files[name] = record_file(output / name)
    manifest = Manifest(files=files, tensors=tensors, about=dict(about))
    write_atomically(work / MANIFEST_NAME, manifest.to_bytes())
    resume_finish(work, output)
    return manifest


def resume_finish(work: Path, output: Path) -> None:
    """The last steps: shards move, then the manifest, then the work folder goes."""
    shards = work / "shards"
    if (work / MANIFEST_NAME).is_file():
        for path in sorted(shards.glob("*.safetensors")):
            os.replace(path, output / path.name)
        _sync(output)
        os.replace(work / MANIFEST_NAME, output / MANIFEST_NAME)
        _sync(output)
    if (output / MANIFEST_NAME).is_file() and work.is_dir():
        shutil.rmtree(work)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
