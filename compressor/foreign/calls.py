"""Calls of libraries on what strangers wrote: whatever is raised is one error, and none hangs."""

import ctypes
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import psutil

from compressor.errors import CompressError, InputError, printable

Result = TypeVar("Result")

PATIENCE = 5.0

SHOWN = 300
"""Characters of a library's own message."""

OURS = (CompressError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What passes as it is."""


@contextmanager
def foreign(what: str, *, hint: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises in a `with` into an InputError that begins with `what`.

    BaseException too, which panics of libraries written in Rust are.
    """
    try:
        yield
    except OURS:
        raise
    except BaseException as error:
        raise InputError(f"{what}: {said(error)}", hint=hint) from error


@contextmanager
def panics_unheard() -> Iterator[None]:
    """Keep back what is written on descriptor 2 in a `with`, and drop it where that raises:
    libraries in Rust print a panic beside raising it."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        before = os.dup(2)
        try:
            os.dup2(kept.fileno(), 2)
            yield
            sys.stderr.flush()
        finally:
            os.dup2(before, 2)
            os.close(before)
        kept.seek(0)
        sys.stderr.write(printable(kept.read().decode(errors="replace")))


@contextmanager
def memory_bound(count: int) -> Iterator[None]:
    """Let the process take `count` bytes more than it has, and no more: MemoryError for who asks.

    Not for code that ends the process where it gets no memory, as Rust does. On Linux only.
    """
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = psutil.Process().memory_info().data + count
    if soft != resource.RLIM_INFINITY:
        bound = min(soft, bound)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def said(error: BaseException) -> str:
    """A library's message on one line; its class where that says more than the words."""
    text = " ".join(str(error).split())
    text = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
    plain = isinstance(error, OSError | ValueError | RuntimeError) or type(error) is Exception
    return text if plain and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def bounded(
    function: Callable[[], Result], *, what: str, seconds: float, hint: str | None = None
) -> Result:
    """`function()` as in `foreign`, and InputError where it takes more than `seconds` of processor
    time (a busy machine is no reason), or `PATIENCE` times as long in all.

    Templates, regular expressions and tokenizers of a stranger may run for ever. A thread that runs
    Python is ended; one in code that nothing interrupts is left behind, and ends with the process.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    began, started = time.process_time(), time.monotonic()
    thread.start()
    thread.join(seconds)
    while thread.is_alive() and (
        time.process_time() - began < seconds and time.monotonic() - started < PATIENCE * seconds
    ):
        thread.join(0.1)
    if thread.is_alive():
        # SystemExit, at its next step in Python.
        number = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(SystemExit))
        raise InputError(f"{what}: no end after {seconds:.0f} s", hint=hint)
    with foreign(what, hint=hint):
        return future.result()
