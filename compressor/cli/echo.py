"""Printing for people. What strangers wrote (names in a file, values of a config) cannot drive the
terminal."""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import click

from compressor.errors import printable

STYLE = re.compile("(\x1b\\[(?:[012]|22|3[0-79]|9[0-7])m)")
"""Colours and weights, which may stay: all that click.style makes of fg, bold and dim."""


LONGEST = 4000
"""Characters of a message that are printed."""


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a line, on stderr with `err`; control characters but for colours are escapes."""
    parts = STYLE.split(text)
    safe = (part if i % 2 else printable(part) for i, part in enumerate(parts))
    click.echo("".join(safe), err=err, nl=nl)


def say(found: Mapping[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Print what was found: one JSON object, or lines for people."""
    for line in [json.dumps(found, indent=2)] if as_json else lines:
        echo(line)


def shortened(text: str) -> str:
    """The beginning of a long text, which may hold all of a stranger's value."""
    left = len(text) - LONGEST
    return text if left <= 0 else f"{text[:LONGEST]}… and {left} more characters"


def escape_libraries() -> None:
    """Escape control characters in what libraries log and warn of, and shorten it, once for the
    whole process: it holds names and values of strangers too."""
    make, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # a library's mistake, which logging tells
            made.msg, made.args = shortened(printable(made.getMessage())), ()
        return made

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *args, **kwargs: printable(
        shortened(format_warning(*args, **kwargs))
    )
