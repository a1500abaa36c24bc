"""Files that a command is asked to write: what is in the way is known before its work begins."""

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from compressor.checkpoint.workspace import refusal
from compressor.cli.main import cli
from compressor.cli.written import obstacle, write_file


def in_the_way(folder: Path) -> dict[Path, str]:
    """Paths that nothing can be written to, and why."""
    (folder / "file").write_text("")
    (folder / "link").symlink_to(folder / "nowhere")
    return {
        folder / "file" / "below": "file is a file",
        folder / "link" / "below": "nowhere, which is not there",
        folder / ("x" * 300) / "below": "File name too long",
    }


def test_what_is_in_the_way_is_said(tmp_path: Path) -> None:
    for path, why in in_the_way(tmp_path).items():
        refused = refusal(path)
        assert refused is not None and why in refused.message
        if "link" not in path.parts:  # what a link leads to is written
            assert why in (obstacle(path) or "")
    for new in (tmp_path / "new", tmp_path / "far" / "new", tmp_path / "link"):
        assert obstacle(new) is None
    assert refusal(tmp_path / "new" / "folder") is None
    assert obstacle(tmp_path) == "it is a folder"


@pytest.mark.parametrize("may", [True, False])
def test_permission_is_asked_for(
    may: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: may or Path(path) != tmp_path)
    refused = refusal(tmp_path / "a" / "b")
    assert (refused is None) is (obstacle(tmp_path / "file") is None) is may
    if refused is not None:
        assert f"nothing can be written into {tmp_path}: Permission denied" in refused.message


@pytest.mark.parametrize(
    "line",
    [
        "measure no-model -o",
        "audit no-model --html",
        "compare no-model other --html",
        "verify no-model --junit",
        "allocate no-file --bits-per-weight 4 --picture",
        "init no-model -o",
    ],
)
def test_it_is_said_before_anything_is_read(line: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli, [*line.split(), str(tmp_path / "file" / "x")])
    assert result.exit_code == 2
    said = re.sub(r"[\s│]+", " ", result.stderr)
    assert "cannot write" in said and "is a file" in said and "no-model" not in said


def test_devices_and_links_stay_what_they_are(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, b"text")
    assert os.read(reader, 10) == b"text" and pipe.is_fifo()
    os.close(reader)
    link.symlink_to(tmp_path / "far" / "away")
    write_file(link, b"text")
    assert link.is_symlink() and (tmp_path / "far" / "away").read_bytes() == b"text"
