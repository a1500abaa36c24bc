"""The `compress` command. Exit codes: 0 done; 1 a check or gate failed; 2 bad input or usage;
3 the machine failed, the same command resumes; 130 interrupted, the same command resumes."""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from compressor import __version__
from compressor.errors import CompressError, MachineError, Problems

COMMANDS = Path(__file__).parent / "commands"


class Commands(click.Group):
    """Sub-commands are the files in `commands/`; a file is imported when its command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(path.stem for path in COMMANDS.glob("*.py") if path.stem != "__init__")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"compressor.cli.commands.{cmd_name}")
        command: click.Command = module.command
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="compress")
def cli() -> None:
    """Compile LLM checkpoints: a recipe in, a packed and verified checkpoint out.

    \b
    compress plan RECIPE     what would happen, what it costs, everything that is wrong
    compress run RECIPE      do it; the same command continues an interrupted run
    compress verify FOLDER   prove the written files
    compress push FOLDER ID  publish them on the Hub

    Exit codes: 0 done; 1 a check or gate failed; 2 bad input or usage; 3 the machine failed and
    the same command resumes; 130 interrupted, likewise.
    """


def main() -> None:
    """Entry point: every error becomes one message and an exit code."""
    # Blocks of changing sizes would otherwise leave the GPU's memory in pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    wants_json = "--json" in sys.argv
    quieten_libraries()
    try:
        code = cli.main(standalone_mode=False, color=colour())
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        code = _fail(_usage(error), None, 2, wants_json)
    except CompressError as error:
        problems = error.problems if isinstance(error, Problems) else [error]
        code = _report(problems, error.exit_code, wants_json)
    except KeyboardInterrupt:
        code = _fail("interrupted", "the same command continues", 130, wants_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except MemoryError:
        code = _fail("out of memory", "the same command continues", 3, wants_json)
    except OSError as error:
        code = _os_error(error, wants_json)
    except Exception as error:
        if os.environ.get("COMPRESS_DEBUG"):
            raise
        what = f"internal error: {type(error).__name__}: {error}"
        hint = "this is a bug: COMPRESS_DEBUG=1 shows where; nothing committed is lost"
        code = _fail(what, hint, 3, wants_json)
    sys.exit(code if isinstance(code, int) else 0)


def program() -> NoReturn:
    """`main` as a process of its own, which ends at once.

    Taking down Python, CUDA and page-locked memory takes seconds after a run, and everything that
    is to last is on the disk by then.
    """
    code: Any = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    with contextlib.suppress(BrokenPipeError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


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
    arguments = sys.argv[1:]
    return "--log-format=json" in arguments or any(
        pair == ("--log-format", "json") for pair in itertools.pairwise(arguments)
    )


def colour() -> bool | None:
    """False where NO_COLOR is set; else None: as the terminal can."""
    return False if os.environ.get("NO_COLOR") else None


def interruptible() -> Any:
    """A function that says whether Ctrl-C (or SIGTERM) came; a second one stops at once."""
    state = {"asked": False}

    def ask(number: int, frame: Any) -> None:
        if state["asked"]:
            raise KeyboardInterrupt
        state["asked"] = True
        text = "stopping after this unit (once more to stop at once)"
        line = json.dumps({"event": "stopping", "text": text}) if logs_json() else text
        # Straight to the descriptor: the signal may have come in the middle of a print, and
        # Python's own streams refuse to be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return lambda: state["asked"]


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context is not None else ""
    return error.format_message() + where


def _os_error(error: OSError, wants_json: bool) -> int:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    hint = "free some space; the same command continues" if full else None
    return _report([MachineError(what, hint=hint)], 3, wants_json)


def _fail(message: str, hint: str | None, code: int, wants_json: bool) -> int:
    error = CompressError(message, hint=hint)
    return _report([error], code, wants_json)


def _report(problems: list[CompressError], code: int, wants_json: bool) -> int:
    if wants_json:
        found = [{"message": p.message, "hint": p.hint} for p in problems]
        click.echo(json.dumps({"ok": False, "exit_code": code, "errors": found}, indent=2))
    for problem in problems:
        if logs_json():
            event = {"event": "error", "time": round(time.time(), 3), "exit_code": code}
            text = json.dumps({**event, "message": problem.message, "hint": problem.hint})
            click.echo(text, err=True)
            continue
        start = click.style("error: ", fg="red", bold=True)
        click.echo(start + problem.message, err=True, color=colour())
        if problem.hint:
            start = click.style("  hint: ", fg="cyan")
            click.echo(start + problem.hint, err=True, color=colour())
    return code
