"""The manifest: SHA-256 and size of every file of an artefact, and of every tensor's bytes.

It is written last, so its presence says that the checkpoint is whole. It holds no time and no path:
two runs that wrote the same bytes wrote the same manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compressor.checkpoint import load_json
from compressor.errors import InputError

MANIFEST_NAME = "manifest.json"
SHA256 = r"^[0-9a-f]{64}$"


class FileRecord(BaseModel):
    """One file of the artefact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=SHA256)
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """What an artefact consists of, and what it was made from.

    files    name → hash and size;  tensors  name → SHA-256 of the tensor's bytes
    about    resolved recipe, source, tokens, versions: everything that decides the bytes
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(1, ge=1, le=1)
    files: dict[str, FileRecord]
    tensors: dict[str, str]
    about: dict[str, Any] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file in this folder")
        return files

    def to_bytes(self) -> bytes:
        """The file's content, the same for the same artefact."""
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none. Raises InputError for a damaged one."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate(load_json(path, what="manifest"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{MANIFEST_NAME} is not a manifest: {where}: {first['msg']}") from error


def record_file(path: Path) -> FileRecord:
    """Hash and size of a file."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return FileRecord(sha256=digest, size=path.stat().st_size)
