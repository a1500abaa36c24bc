"""The manifest: what a finished checkpoint consists of, byte for byte. It is written last, so its
presence is the mark of a finished one.

It covers the artefact (shards, index, config, tokenizer, policy, recipe) and nothing that carries
a time or a path, so that two runs of one recipe give the same manifest.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.checkpoint.reader import load_json
from compressor.errors import InputError

MANIFEST_NAME = "manifest.json"
RECIPE_NAME = "recipe.yaml"
VERSION = 1
DECLARED = "config_files"
"""Key of `about`: what files that loaders read said when they were written, by their names."""
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: SHA-256 of its content in hex, and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a finished checkpoint consists of.

    files    path in the folder, with `/` → its record, the manifest itself left out
    tensors  tensor name → SHA-256 of its bytes as they are stored
    about    what it was made from: recipe, source, format, versions; plain JSON data
    """

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """The file's content; equal manifests give equal bytes."""
        value = {
            "version": self.version,
            "about": self.about,
            "files": {n: {"sha256": r.sha256, "size": r.size} for n, r in self.files.items()},
            "tensors": dict(self.tensors),
        }
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        return (text + "\n").encode()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint folder, or None where there is none.

    Raises InputError for one that is damaged or of a version that is not known.
    """
    path = folder / MANIFEST_NAME
    return as_manifest(load_json(path, what="manifest")) if path.exists() else None


def as_manifest(data: Mapping[str, Any]) -> Manifest:
    """A manifest from its JSON object. Raises InputError."""
    if data.get("version") != VERSION:
        raise InputError(
            f"{MANIFEST_NAME} has version {data.get('version')!r}; {VERSION} is known here",
            hint="another version of this program wrote it, or it is damaged",
        )
    files, tensors, about = data.get("files"), data.get("tensors"), data.get("about", {})
    if not all(isinstance(part, dict) for part in (files, tensors, about)):
        raise InputError(f"{MANIFEST_NAME} is damaged: files, tensors or about is not an object")
    assert isinstance(files, dict) and isinstance(tensors, dict)
    for name, digest in tensors.items():
        if not _is_digest(digest):
            raise InputError(f"{MANIFEST_NAME} is damaged: tensor {name!r} has no SHA-256")
    try:
        json.dumps(about, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{MANIFEST_NAME} is damaged: {error}") from error
    return Manifest(
        files={name: _file_record(name, value) for name, value in files.items()},
        tensors=tensors,
        about=about,
    )


def declared(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The content of those of some written files that tell loaders what the weights are."""
    return {n: as_recorded(data) for n, data in files.items() if n.endswith("config.json")}


def as_recorded(data: bytes | str) -> Any:
    """JSON as a manifest has it: infinity and NaN, which configs may hold, by their names."""
    return json.loads(data, parse_constant=str)


def hash_file(path: Path) -> FileRecord:
    """Hash and size of a file, which is read once and never whole in memory."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return FileRecord(sha256=digest, size=handle.tell())


def _file_record(name: str, value: Any) -> FileRecord:
    odd = name == MANIFEST_NAME or "\0" in name or "\\" in name
    if odd or any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(f"{MANIFEST_NAME} names {name!r}, which is no file of its own folder")
    size = value.get("size") if isinstance(value, dict) else None
    if type(size) is not int or size < 0 or not _is_digest(value.get("sha256")):
        raise InputError(f"{MANIFEST_NAME} is damaged: the record of {name!r} is incomplete")
    return FileRecord(sha256=value["sha256"], size=size)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None
