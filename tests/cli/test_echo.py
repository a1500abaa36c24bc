"""What strangers wrote cannot drive the terminal of who reads it."""

import io
import logging
import sys
import warnings

import click
import pytest
from rich.console import Console

from compressor.cli.display import Display
from compressor.cli.echo import echo, escape_libraries
from compressor.errors import InputError, Problems, printable

EVIL = "a\x1b]0;title\x07\x1b[2Jb\u202egpj\x9b31m\x7f\r"
SAFE = r"a\x1b]0;title\x07\x1b[2Jb\u202egpj\x9b31m\x7f\r"


def test_control_characters_become_escapes_and_lines_stay() -> None:
    assert printable(EVIL) == SAFE
    assert printable("größe\n\t木 ± \U0001f600") == "größe\n\t木 ± \U0001f600"
    assert printable("\udcff").encode() == b"\\udcff"


def test_errors_hold_no_control_characters() -> None:
    error = InputError(EVIL, hint=EVIL)
    assert (error.message, error.hint, str(error)) == (SAFE, SAFE, SAFE)
    assert str(Problems([error, error])) == f"2 problems\n1. {SAFE}\n2. {SAFE}"


def test_results_keep_their_own_colours_only(capsys: pytest.CaptureFixture[str]) -> None:
    with click.Context(click.Command("x"), color=True):
        echo(click.style("passed", fg="green", bold=True) + EVIL)
    assert capsys.readouterr().out == f"\x1b[32m\x1b[1mpassed\x1b[0m{SAFE}\n"


@pytest.mark.parametrize("fg", ["red", "bright_cyan", "reset"])
@pytest.mark.parametrize("bold", [True, False, None])
@pytest.mark.parametrize("dim", [True, False, None])
def test_every_colour_and_weight_of_ours_stays(
    fg: str, bold: bool | None, dim: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    styled = click.style("passed", fg=fg, bold=bold, dim=dim)
    with click.Context(click.Command("x"), color=True):
        echo(styled)
    assert capsys.readouterr().out == f"{styled}\n"


def test_progress_is_safe() -> None:
    out = io.StringIO()
    Display(log_format="plain", file=out).event("note", text=EVIL)
    assert out.getvalue() == f"note: {SAFE}\n"


def test_what_libraries_log_and_warn_of_is_safe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = logging.getLogRecordFactory(), warnings.formatwarning
    monkeypatch.setattr(warnings, "formatwarning", plain)
    escape_libraries()
    try:
        logger, handler = logging.Logger("library"), logging.StreamHandler(sys.stderr)
        logger.addHandler(handler)
        logger.warning("%s is no rope type", EVIL)
        assert capsys.readouterr().err == f"{SAFE} is no rope type\n"
        logger.warning("%s", "x" * 5000)
        assert capsys.readouterr().err == f"{'x' * 4000}… and 1000 more characters\n"
        assert f"UserWarning: {SAFE}\n" in warnings.formatwarning(EVIL, UserWarning, "f.py", 1)
    finally:
        logging.setLogRecordFactory(before)


def test_a_live_display_is_safe() -> None:
    stage = Display(file=io.StringIO(), log_format="plain")
    with stage.stage(EVIL, 2):
        stage.unit(EVIL, 1, 2, error=0.5, note=EVIL)
        stage.unit(EVIL, 2, 2, error=0.5, note=EVIL)
        console = Console(file=io.StringIO(), width=200, force_terminal=False)
        console.print(stage._stage)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert SAFE.split(r"\x9b")[0] in shown
