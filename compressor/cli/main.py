"""The `compress` command. Exit codes: 0 done; 1 a check or gate failed; 2 bad input or usage;
3 the machine failed, the same command resumes; 130 interrupted, the same command resumes."""

import contextlib
import errno
import importlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.shell_completion import shell_complete

from compressor import __version__
from compressor.cli.echo import echo, shortened
from compressor.cli.groups import Group, usage
from compressor.cli.junit import error_cases, write_cases
from compressor.cli.options import CASES
from compressor.cli.written import obstacle
from compressor.errors import CompressError, InputError, MachineError, Problems, printable
from compressor.ranks.place import ERROR_FILE, place_of
from compressor.runner.page_locking import SETTINGS

COMMANDS = Path(__file__).parent / "commands"
MISNAMED = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL),
)
"""What is wrong with a path that was named, and not with the machine."""

SHARED = ("run", "quantize", "verify", "eval")
"""Commands that several ranks do together."""


class InternalError(MachineError):
    """Something that nothing was prepared for."""


class Commands(Group):
    """Sub-commands are the files in `commands/`; a file is imported when its command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(path.stem for path in COMMANDS.glob("*.py") if path.stem != "__init__")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"compressor.cli.commands.{cmd_name}")
        command: click.Command = module.command
        return command


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(__version__, prog_name="compress")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compile LLM checkpoints: a recipe in, a packed and verified checkpoint out.

    \b
    compress quantize MODEL  choose a recipe for a --scheme such as w4a16, and run it
    compress plan RECIPE     what would happen, what it costs, everything that is wrong
    compress run RECIPE      do it; the same command continues an interrupted run
    compress verify FOLDER   prove the written files
    compress push FOLDER ID  publish them on the Hub

    Exit codes: 0 done; 1 a check or gate failed; 2 bad input or usage; 3 the machine failed and
    the same command resumes; 130 interrupted, likewise.
    """
    command = context.invoked_subcommand
    if command not in SHARED and place_of() is not None:
        raise InputError(
            f"compress {command} is one process, and torchrun started several",
            hint=f"several share compress {', '.join(SHARED)}",
        )


def main() -> None:
    """Run the command line: every error becomes one message and an exit code."""
    # Blocks of changing sizes would otherwise leave the GPU's memory in pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", f"expandable_segments:True,{SETTINGS}")
    # Without it PyTorch refuses products where kernels are to repeat themselves.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    quieten_libraries()
    if asked := os.environ.get("_COMPRESS_COMPLETE"):
        sys.exit(shell_complete(cli, {}, "compress", "_COMPRESS_COMPLETE", asked))
    arguments = sys.argv[1:]
    context = None
    try:
        require_utf8(arguments)
        # Not cli.main, which ends with 1, a failed check, when the reader of a pipe has gone.
        with cli.make_context("compress", arguments, color=colour()) as context:
            code = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as ended:
        code = ended.exit_code
    except SystemExit:
        raise
    except BaseException as error:  # also what a library in Rust raises
        code, problems = outcome(error)
        if isinstance(problems[0], InternalError) and os.environ.get("COMPRESS_DEBUG"):
            raise
        if context is None or CASES not in context.meta:
            problems += _late_junit(error, arguments)
        report(problems, code, as_json="--json" in arguments)
    sys.exit(code if isinstance(code, int) else 0)


def require_utf8(arguments: Sequence[str]) -> None:
    """Raises InputError for words that are no UTF-8, as names of files may be."""
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{word} is not UTF-8, and the libraries that read models take no other paths",
                hint="rename the file or folder, or name it by a link",
            ) from error


def outcome(error: BaseException) -> tuple[int, list[CompressError]]:
    """The exit code that an error stands for, and what to say of it."""
    if isinstance(error, Problems):
        return error.exit_code, error.problems
    if isinstance(error, CompressError):
        return error.exit_code, [error]
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        return 130, [CompressError("interrupted", hint="the same command continues")]
    if isinstance(error, click.ClickException):
        return 2, [InputError(usage(error))]
    if is_out_of_memory(error):
        return 3, [MachineError("out of memory", hint="the same command continues")]
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        if error.errno in MISNAMED:
            return 2, [InputError(what)]
        hint = "free some space; the same command continues" if full else None
        return 3, [MachineError(what, hint=hint)]
    what = f"internal error: {type(error).__name__}: {error}"
    hint = "this is a bug: COMPRESS_DEBUG=1 shows where; nothing committed is lost"
    return 3, [InternalError(what, hint=hint)]


def _late_junit(error: BaseException, arguments: list[str]) -> list[CompressError]:
    """Write the test report of a command that ended before it could; what is wrong with that."""
    path = value_of("--junit", arguments)
    if path is None:
        return []
    name, file = arguments[0], Path(path).expanduser()
    if obstacle(file) is not None:  # said already, by the option
        return []
    try:
        write_cases(file, error_cases(error, name), name)
    except CompressError as failed:
        return [failed]
    return []


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What is given for an option, in either form."""
    for word, following in itertools.pairwise([*arguments, ""]):
        if word == option and following:
            return following
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own word for it, a GPU's, or that of PyTorch's allocator on a CPU."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    named = isinstance(error, MemoryError) or "OutOfMemoryError" in kinds
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def quieten_libraries() -> None:
    """Progress bars of libraries only where somebody watches; no loose lines among JSON lines.

    Read when they are imported, which is later.
    """
    if not sys.stderr.isatty() or logs_json():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    if logs_json():
        for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
            os.environ.setdefault(name, "error")


def logs_json() -> bool:
    """Whether stderr is to hold JSON lines only."""
    return value_of("--log-format", sys.argv[1:]) == "json"


def colour() -> bool | None:
    """False where NO_COLOR is set; else None: as the terminal can."""
    return False if os.environ.get("NO_COLOR") else None


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C (or SIGTERM) came; a second one stops at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        text = "stopping after this unit (once more to stop at once)"
        line = json.dumps({"event": "stopping", "text": text}) if logs_json() else text
        # Straight to the descriptor: the signal may have come in the middle of a print, and
        # Python's own streams refuse to be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())

    before = [(number, signal.signal(number, ask)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield lambda: asked
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def tell_starter(problems: Sequence[CompressError]) -> None:
    """Leave what went wrong where torchrun, or `--gpus`, looks for it."""
    if path := os.environ.get(ERROR_FILE):
        text = "; ".join(printable(problem.message) for problem in problems)
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))


def report(problems: Sequence[CompressError], code: int, *, as_json: bool) -> None:
    """Say what went wrong: one object on stdout for machines, and lines on stderr; a rank also says
    it to whoever started it."""
    if place_of() is not None:
        tell_starter(problems)
    if as_json:
        found = [{"message": p.message, "hint": p.hint} for p in problems]
        echo(json.dumps({"ok": False, "exit_code": code, "errors": found}, indent=2))
    for problem in problems:
        message = shortened(problem.message)
        if logs_json():
            event = {"event": "error", "time": round(time.time(), 3), "exit_code": code}
            text = json.dumps({**event, "message": message, "hint": problem.hint})
            echo(text, err=True)
            continue
        echo(click.style("error: ", fg="red", bold=True) + message, err=True)
        if problem.hint:
            echo(click.style("  hint: ", fg="cyan") + problem.hint, err=True)
