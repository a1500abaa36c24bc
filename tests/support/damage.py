"""What happens to files on a disk, as functions of a path."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def flip(path: Path, part: float) -> None:
    """One bit, at a part of the file."""
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * part), len(data) - 1)] ^= 1
    path.write_bytes(data)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("a file")


def huge(path: Path) -> None:
    """Gigabytes of zeros, which take no room."""
    with path.open("r+b") as handle:
        handle.truncate(4 << 30)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def forget(path: Path) -> None:
    """Half of a JSON object's keys, or of a file's bytes."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        os.truncate(path, path.stat().st_size // 3)
        return
    kept = list(value)[: len(value) // 2]
    path.write_text(json.dumps({key: value[key] for key in kept}))


def mistype(path: Path) -> None:
    """Every value of a JSON object becomes a number; zeros where it is none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        path.write_bytes(bytes(path.stat().st_size))
        return
    path.write_text(json.dumps(dict.fromkeys(value, 7)))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "lost": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped early": lambda path: flip(path, 0.0),
    "flipped": lambda path: flip(path, 0.5),
    "flipped late": lambda path: flip(path, 0.98),
    "{}": lambda path: path.write_text("{}") and None,
    "[]": lambda path: path.write_text("[]") and None,
    "null": lambda path: path.write_text("null") and None,
    "half of its keys": forget,
    "other types": mistype,
    "deep": lambda path: path.write_text("[" * 100_000) and None,
    "a folder": folder,
    "huge": huge,
    "a pipe": pipe,
}


def exchange(path: Path, other: Path) -> None:
    """Two files change places."""
    aside = path.with_name("aside")
    shutil.move(path, aside)
    shutil.move(other, path)
    shutil.move(aside, other)
