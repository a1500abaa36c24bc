"""Git LFS pointers: the small text files that a clone without git-lfs leaves in place of others."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer; False where it cannot be read."""
    try:
        with path.open("rb") as handle:
            return handle.read(len(POINTER)) == POINTER
    except OSError:
        return False


def pointer_error(name: str) -> InputError:
    """What to say of one."""
    return InputError(
        f"{name} is a Git LFS pointer, not the file itself",
        hint="git lfs install && git lfs pull in that folder, or: hf download",
    )
