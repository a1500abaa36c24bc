"""Progress: live in a terminal, plain lines elsewhere, one JSON object a line where asked."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from compressor.cli.display import Display, _Stage, duration, rate, size, sparkline
from compressor.cli.junit import Case, junit
from compressor.cli.main import main
from compressor.errors import InputError, Problems

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def work(display: Display) -> None:
    with display.stage("compress", 3):
        for i in range(3):
            display.unit(
                f"model.layers.{i}", i + 1, 3, error=0.01 * (i + 1), rate=12.5e6, memory=526e6
            )


def test_numbers_for_people() -> None:
    assert [size(n) for n in (7, 7_000, 7e6, 7e9, 7e12)] == [
        "7 B",
        "7 kB",
        "7.00 MB",
        "7.00 GB",
        "7.00 TB",
    ]
    assert [duration(s) for s in (0.52, 12.4, 65, 3725)] == [
        "0.5 s",
        "12 s",
        "1 min 05 s",
        "1 h 02 min",
    ]
    assert [rate(n) for n in (2.5e6, 2.5e9)] == ["2.5 M weights/s", "2.50 G weights/s"]


def test_a_sparkline_shows_the_last_values_from_zero_up() -> None:
    assert sparkline([0.0, 0.5, 1.0], 8) == "▁▅█"
    assert sparkline([0.0, 0.0], 8) == "▁▁" and sparkline([], 8) == ""
    assert len(sparkline([1.0] * 90, 64)) == 64


def test_without_a_terminal_there_are_plain_lines() -> None:
    out = io.StringIO()
    work(Display(file=out))
    lines = out.getvalue().splitlines()
    assert lines[0] == "compress: units 3" and len(lines) == 4
    assert lines[1].startswith(
        "  [1/3] model.layers.0  error 1.00e-2  12.5 M weights/s  memory 526.00 MB  left "
    )
    assert lines[3].endswith("memory 526.00 MB"), "nothing is left"
    assert "\x1b" not in out.getvalue()


def test_json_lines_are_one_object_each(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with warnings.catch_warnings():
        display = Display(log_format="json", file=out)
        work(display)
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["compress", *["unit"] * 3, "stage done", "warning"]
    assert events[2]["unit"] == "model.layers.1" and events[2]["total"] == 3
    assert events[2]["error"] == 0.02 and events[3]["left_seconds"] == 0


def everything(master: int) -> str:
    """What was written to a terminal so far; one read gives no more than its buffer holds."""
    found = b""
    while select.select([master], [], [], 0.5)[0]:
        found += os.read(master, 65536)
    return found.decode()


def test_a_terminal_shows_a_bar_the_error_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        display = Display(file=terminal)
        assert display.live
        work(display)
        display.event("note", text="seen")
        terminal.flush()
        shown = everything(master)
    os.close(master)
    assert "\x1b[" in shown
    text = ESCAPE.sub("", shown)
    assert "compress" in text and "3/3" in text
    assert "model.layers.2  error 3.00e-2  12.5 M weights/s  memory 526.00 MB" in text
    assert "error by unit" in text and "up to 3.00e-2" in text
    assert "compress: 3 units in" in text and "note: seen" in text


def test_a_terminal_that_can_do_nothing_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        assert not Display(file=terminal).live
    os.close(master)


def cases_of(path: Path) -> Any:
    return ElementTree.parse(path).getroot()[0]


def test_junit_holds_checks_and_is_written_whatever_happens(tmp_path: Path) -> None:
    path = tmp_path / "new" / "junit.xml"
    with pytest.raises(Problems), junit(path, "run") as cases:
        cases.append(Case("plan", "recipe", seconds=0.5))
        cases.append(Case("gate", "kl <&\x00>", failure="KL is\x07 too high"))
        raise Problems([InputError("one", hint="do this"), InputError("two")])
    suite = cases_of(path)
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "1", "2")
    assert suite[1].get("name") == "kl <&\ufffd>"
    assert suite[2].find("error").text == "one\nhint: do this"
    with pytest.raises(KeyboardInterrupt), junit(path, "run"):
        raise KeyboardInterrupt
    assert cases_of(path).get("errors") == "1"


def test_a_command_in_a_pipeline_prints_no_colour_and_json_only(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    data = {
        "model": str(tiny_model("llama")),
        "output": str(tmp_path / "out"),
        "passes": [{"rtn": {"group_size": 32}}],
        "evaluate": {"windows": 2, "length": 32},
        "gate": {"kl": 1e-9},
    }
    recipe.write_text(yaml.safe_dump(data))
    start = "from compressor.cli.main import main; main()"
    arguments = ["run", str(recipe), "--device", "cpu", "--json", "--log-format", "json"]
    command = [sys.executable, "-c", start, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["gate"]["passed"] is False
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert events[0] == "compress" and events.count("stage done") == 3
    assert "\x1b" not in done.stdout + done.stderr
    recipe.write_text(yaml.safe_dump({**data, "passes": [{"rnt": {}}]}))
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    capsys.readouterr()  # what making the model said
    with pytest.raises(SystemExit, match="2"):
        main()
    (event,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert event["event"] == "error" and event["exit_code"] == 2 and "rtn" in event["hint"]


def test_a_stopped_run_says_so_to_machines_and_continues(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while a unit is worked on: that unit is finished, the exit code is 130."""
    from click.testing import CliRunner

    from compressor.cli.main import cli

    recipe = tmp_path / "recipe.yaml"
    data = {"model": str(tiny_model("llama")), "output": str(tmp_path / "out")}
    recipe.write_text(yaml.safe_dump({**data, "passes": [{"rtn": {"group_size": 32}}]}))
    asked = iter([False, False, True])
    stop = "compressor.cli.main.interruptible"
    monkeypatch.setattr(stop, lambda: nullcontext(lambda: next(asked)))
    arguments = [
        "run",
        str(recipe),
        "--device",
        "cpu",
        "--json",
        "--junit",
        str(tmp_path / "j.xml"),
    ]
    stopped = CliRunner().invoke(cli, arguments)
    assert stopped.exit_code == 130 and json.loads(stopped.stdout)["exit_code"] == 130
    assert cases_of(tmp_path / "j.xml").get("errors") == "1"
    monkeypatch.setattr(stop, lambda: nullcontext(lambda: False))
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0 and json.loads(done.stdout)["ok"]
    assert "resumed yes" in done.stderr


def test_the_time_left_goes_by_units_and_not_by_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten units are told of at a time; then another count begins."""
    clock = [100.0]
    monkeypatch.setattr("compressor.cli.display.time.perf_counter", lambda: clock[0])
    stage = _Stage("tokens", 0)
    for done in (10, 20):
        clock[0] += 5.0
        stage.finish("first look", done, 100, {})
    assert stage.left == pytest.approx(40.0)
    clock[0] += 1.0
    stage.finish("second look", 2, 10, {})
    assert stage.left == pytest.approx(4.0) and stage.spent == pytest.approx(11.0)
