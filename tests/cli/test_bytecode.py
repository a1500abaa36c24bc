"""Libraries that were installed without byte code are not compiled anew by each run."""

import importlib
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor.cli.process import keep_bytecode

NAME = "a_library_without_bytecode"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package where Python neither finds nor keeps byte code, and a cache folder of one's own."""
    made = tmp_path / "site" / NAME / "__init__.py"
    made.parent.mkdir(parents=True)
    made.write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(made.parents[1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    yield made
    sys.modules.pop(NAME, None)


def test_it_is_kept_in_the_cache_of_the_user(library: Path, tmp_path: Path) -> None:
    keep_bytecode(NAME)
    assert sys.pycache_prefix == str(tmp_path / "cache" / "compressor" / "bytecode")
    importlib.import_module(NAME)
    assert not (library.parent / "__pycache__").exists()
    assert [path.name.split(".")[0] for path in (tmp_path / "cache").rglob("*.pyc")] == ["__init__"]


def test_what_is_there_is_used(library: Path) -> None:
    py_compile.compile(str(library))
    keep_bytecode(NAME)
    assert sys.pycache_prefix is None and sys.dont_write_bytecode


def test_what_python_keeps_itself_is_left_to_it(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    keep_bytecode(NAME)
    assert sys.pycache_prefix is None


def test_a_folder_that_was_chosen_is_left_as_it_is(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", "/elsewhere")
    keep_bytecode(NAME)
    assert sys.pycache_prefix == "/elsewhere" and sys.dont_write_bytecode


def test_a_library_that_is_missing_is_no_error_here() -> None:
    keep_bytecode("a_library_that_nobody_has")
