"""Files that are on the disk when a call returns: written whole, renamed, and their folder synced.

Every rename of the program goes through `move`: one that is not followed by a sync of its folder
may be undone by a crash, whatever was synced before it.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is either whole or not there, readable as the umask says."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    move(temporary, path)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, and sync both folders."""
    os.replace(source, target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A descriptor of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames into a folder durable."""
    with opened(folder) as handle:
        os.fsync(handle)


def in_the_way(path: Path) -> str | None:
    """What keeps a new file or folder from being made at a path, or one that is there from being
    replaced: something else above it, or a missing permission. None where nothing does."""
    try:
        if path.is_symlink() and not path.exists():
            return f"{path} is a link to {os.readlink(path)}, which is not there"
        for above in path.absolute().parents:
            if above.is_symlink() and not above.exists():
                return f"{above} is a link to {os.readlink(above)}, which is not there"
            if above.is_dir():
                may = os.access(above, os.W_OK | os.X_OK)
                return None if may else f"nothing can be written into {above}: Permission denied"
            if above.exists():
                return f"{above} is a file"
    except OSError as error:
        return error.strerror or str(error)
    return None


def make_folder(folder: Path) -> None:
    """A folder and those above it. Raises OSError where something else is in the way."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def own_folder(folder: Path) -> None:
    """A folder of a work folder; what has its name and is none goes."""
    if not folder.is_dir():
        folder.unlink(missing_ok=True)
    make_folder(folder)


def is_file(path: Path) -> bool:
    """Whether a regular file is there: no link, folder, pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def make_way(path: Path) -> None:
    """Remove what has the name of a file of our own and is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not is_file(path):
        path.unlink(missing_ok=True)
