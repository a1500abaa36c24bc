"""`compress` as a process: its signals, its streams and its end.

Imports nothing that takes time, so that a signal is an interruption from the first moment on.
"""

import io
import os
import signal
import sys
from importlib.util import cache_from_source, find_spec
from typing import Any, NoReturn

TURN = 0.0005
"""Seconds that a thread keeps Python to itself. Those that read and write would otherwise hold up
the one that starts a GPU's kernels, which gives it up with each of them."""


class Outlet(io.FileIO):
    """A descriptor whose reader may go away.

    What nobody reads any more is dropped: the work goes on, and the exit code says how it ended.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def program() -> NoReturn:
    """Run the command line and end the process with its exit code.

    The end is at once: taking down Python, CUDA and page-locked memory takes seconds after a run,
    and everything that is to last is on the disk by then.
    """
    code: Any = 130
    try:
        speak_utf8()
        sys.setswitchinterval(TURN)
        catch_signals()
        open_streams()
        silence_ranks()
        keep_bytecode("torch")
        from compressor.cli.echo import escape_libraries
        from compressor.cli.main import main

        escape_libraries()
        main()
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt:
        pass  # a second one, while the first was being reported
    except OSError:
        code = 3  # nowhere to report to
    os._exit(code if isinstance(code, int) else 0)


def speak_utf8() -> None:
    """Start again in UTF-8 where the locale has another encoding and Python was told to keep it:
    recipes are UTF-8, and libraries take paths in nothing else."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts, too
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def catch_signals() -> None:
    """SIGTERM and a closed terminal interrupt like Ctrl-C; `nohup` keeps its meaning."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)


def interrupt(number: int, frame: Any) -> NoReturn:
    """A signal as an exception."""
    raise KeyboardInterrupt


def open_streams() -> None:
    """Give the program all three streams.

    A closed one is the null device, before a file could get its number. Characters that a stream
    cannot hold are written as escapes.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def silence_ranks() -> None:
    """Of several processes that torchrun started the first alone speaks, for all of them."""
    if os.environ.get("RANK", "0") == "0" or "COMPRESS_DEBUG" in os.environ:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def keep_bytecode(library: str) -> None:
    """Where libraries lie without byte code and Python would not keep it there, keep it in the
    user's cache; `library` stands for all.

    Images are often built without it, with PYTHONDONTWRITEBYTECODE or in folders that are read
    only. Then each run compiles PyTorch and transformers anew, which takes longer than to import
    them. A PYTHONPYCACHEPREFIX is left as it is.
    """
    found = find_spec(library)
    if sys.pycache_prefix is not None or found is None or found.origin is None:
        return
    kept = not sys.dont_write_bytecode and os.access(os.path.dirname(found.origin), os.W_OK)
    if kept or os.path.exists(cache_from_source(found.origin)):
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):
        sys.pycache_prefix = os.path.join(cache, "compressor", "bytecode")
        sys.dont_write_bytecode = False


def _stream(descriptor: int, before: Any) -> io.TextIOWrapper:
    raw = Outlet(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
    )
