"""Calls of libraries on what strangers wrote: whatever is raised is one error, and none hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from compressor.errors import CompressError, InputError

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

    Templates, regular expressions and tokenizers of a stranger may run for ever, in code that
    nothing interrupts; such a thread is left behind, and ends with the process.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    began, started = time.process_time(), time.monotonic()
    thread.start()
    thread.join(seconds)
    while thread.is_alive() and (
        time.process_time() - began < seconds and time.monotonic() - started < PATIENCE * seconds
    ):
        thread.join(0.1)
    if thread.is_alive():
        raise InputError(f"{what}: no end after {seconds:.0f} s", hint=hint)
    with foreign(what, hint=hint):
        if errors:
            raise errors[0]
    return results[0]
