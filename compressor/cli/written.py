"""Files that a command is asked to write: that they can be is known before its work begins."""

import errno
import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from compressor.cli.echo import echo
from compressor.errors import InputError, MachineError


class OnDisk(click.ParamType):  # type: ignore[type-arg]  # no generic before click 8.4
    """What a shell completes by the files that are there."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class WrittenFile(OnDisk):
    """A file to write, in folders that may not be there yet. A device or a pipe is one, too."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. A usage error where nothing can be written."""
        path = Path(value).expanduser()
        if (why := obstacle(path)) is not None:
            self.fail(f"cannot write {path}: {why}", param, ctx)
        return path


WRITTEN = WrittenFile()


def obstacle(path: Path) -> str | None:
    """Why a file cannot be written, if that is known."""
    from compressor.checkpoint.durable import in_the_way

    try:
        if path.is_dir():
            return "it is a folder"
        if _is_stream(path):
            return None if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
        # What is at the end of a link is written, and the link stays.
        return in_the_way(path.resolve())
    except (OSError, RuntimeError) as error:
        return getattr(error, "strerror", None) or str(error)


def _is_stream(path: Path) -> bool:
    """A device or a pipe, or /dev/stdout wherever it leads: written to, not replaced."""
    if not path.exists():
        return False
    return not path.is_file() or path.absolute().parts[1:2] in (("dev",), ("proc",))


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file, or none, and the folders above it. Raises MachineError."""
    from compressor.checkpoint.durable import write_atomically

    try:
        if _is_stream(path):
            path.write_bytes(data)
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, data)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from error


def new_file(path: Path | None) -> None:
    """Raises InputError where a file is that is not to be written over."""
    if path is not None and path.is_file():
        raise InputError(f"{path} is there already", hint="--output names another file")


def put(text: str, path: Path | None, *, replace: bool = False) -> None:
    """Print a text, or write it to a file. Raises InputError where one is, unless replaced."""
    if path is None:
        echo(text, nl=False)
        return
    if not replace:
        new_file(path)
    write_file(path, text.encode())
