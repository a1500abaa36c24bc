"""`compress` as a process: pipes that break, signals at any moment, streams that are closed."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import torch
import transformers
import yaml

from compressor import __version__
from compressor.cli.main import main
from compressor.cli.process import catch_signals

ROOT = Path(__file__).resolve().parents[2]
COMPRESS = [sys.executable, "-m", "compressor"]


@pytest.fixture
def recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    passes = [{"rtn": {"group_size": 32}}]
    data = {"model": str(tiny_model("llama")), "output": str(tmp_path / "out"), "passes": passes}
    path.write_text(yaml.safe_dump({**data, "verify": False, "report": False}))
    return path


def shell(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """`compress` as "$@" in a script of bash."""
    command = ["bash", "-c", script, "bash", *COMPRESS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_signal_that_asks_to_stop_interrupts(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        signal.signal(number, signal.SIG_DFL)  # it may be ignored here, under nohup
        catch_signals()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 10)  # a signal comes at the latest here
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)


def test_nohup_keeps_its_meaning() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        catch_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_outside_the_loop_is_an_interruption(tmp_path: Path) -> None:
    """While the recipe is still awaited: long before there are units that could be finished."""
    pipe, junit = tmp_path / "recipe.yaml", tmp_path / "j.xml"
    os.mkfifo(pipe)
    arguments = ["run", str(pipe), "--json", "--junit", str(junit)]
    process = subprocess.Popen(
        [*COMPRESS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with pipe.open("w"):  # opens once it is read
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert json.loads(out)["exit_code"] == 130
    assert errors.startswith("error: interrupted") and "Traceback" not in errors
    assert ElementTree.parse(junit).getroot()[0].get("errors") == "1"


def test_a_reader_that_goes_away_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    done = shell('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', "run", recipe, "--device", "cpu")
    assert done.returncode == 0
    assert (tmp_path / "out" / "manifest.json").is_file()
    failed = shell('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', "recipes", "nothing")
    assert failed.returncode == 2


def test_closed_streams_change_nothing(recipe: Path, tmp_path: Path) -> None:
    done = shell('"$@" <&- >&- 2>&-', "run", recipe, "--device", "cpu")
    assert done.returncode == 0 and done.stdout == done.stderr == ""
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert shell('"$@" >&-', "recipes", "nothing").returncode == 2


def test_a_full_disk_under_stdout_is_the_machines_failure() -> None:
    done = shell('"$@" >/dev/full', "recipes")
    assert done.returncode == 3
    assert "No space left" in done.stderr and "Traceback" not in done.stderr


def test_an_encoding_without_a_character_gets_an_escape() -> None:
    done = shell('PYTHONIOENCODING=latin-1 "$@"', "recipes", "木")
    assert done.returncode == 2 and "no recipe '\\u6728'" in done.stderr


def test_a_file_system_without_locks_is_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("compressor.checkpoint.workspace.fcntl.flock", no_locks)
    monkeypatch.setattr("sys.argv", ["compress", "run", str(recipe), "--device", "cpu"])
    with pytest.raises(SystemExit) as left:
        main()
    errors = capsys.readouterr().err
    assert left.value.code == 3
    assert (
        "cannot lock" in errors and "No locks available" in errors and "another run" not in errors
    )


def test_a_source_tree_that_is_not_installed(recipe: Path, tmp_path: Path) -> None:
    """`python -m compressor`, with nothing of this program's installation in sight."""
    libraries = os.pathsep.join(
        {str(Path(m.__file__ or "").parents[1]) for m in (click, torch, transformers, yaml)}
    )
    environment = {**os.environ, "PYTHONPATH": libraries}

    def compress(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-m", "compressor", *map(str, arguments)]
        options: Any = {"capture_output": True, "text": True, "env": environment, "cwd": ROOT}
        return subprocess.run(command, timeout=120, **options)

    assert "llama2-awq" in compress("recipes").stdout
    ran = compress("run", recipe, "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    made = compress(
        "convert", tmp_path / "out", tmp_path / "gptq", "--format", "gptq", "--allow-rounding"
    )
    assert made.returncode == 0, made.stderr
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["meta"]["quantizer"] == [f"compressor:{__version__}"]


def test_a_locale_without_utf8_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "mödel"
    folder.mkdir()
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "compressor", "inspect"]
    done = subprocess.run(
        [*command, folder], env=os.environ | locale, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert f"error: {folder} has no config.json".encode() in done.stderr
    odd = os.fsencode(tmp_path) + b"/m\xf6del"
    done = subprocess.run([*map(os.fsencode, command), odd], capture_output=True, check=False)
    assert done.returncode == 2 and b"is not UTF-8" in done.stderr
