"""What lies in place of a file: the small text files that a clone without git-lfs leaves, and links
to what is not there."""

import os
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


def lost_link(folder: Path) -> str | None:
    """What to do about the first link of a folder whose file is not there, if it has one."""
    lost = sorted(p for p in folder.glob("*") if p.is_symlink() and not p.exists())
    if not lost:
        return None
    named = f"{lost[0].name} is a link to {os.readlink(lost[0])}, which is not there"
    if folder.parent.name == "snapshots":
        return f"{named}: copy the entry of the Hub's cache whole, or its snapshot with cp -rL"
    return f"{named}: copy the files themselves (cp -rL)"


def pointer_error(name: str) -> InputError:
    """What to say of one."""
    return InputError(
        f"{name} is a Git LFS pointer, not the file itself",
        hint="git lfs install && git lfs pull in that folder, or: hf download",
    )
