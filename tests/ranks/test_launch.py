"""The launcher waits for its ranks, and says what the leading one could not."""

import os
import signal
import threading
from pathlib import Path

import pytest

from compressor.errors import CompressError, MachineError
from compressor.ranks import launch as module
from compressor.ranks.launch import launch


def ended(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str] | None = None
) -> int:
    """The exit code of two ranks that run a shell script."""
    program = tmp_path / "rank"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(program))
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    return launch(2, [], ([] if notes is None else notes).append)


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_ranks_that_end_alike_give_their_code(code, tmp_path, monkeypatch) -> None:
    assert ended(f"exit {code}", tmp_path, monkeypatch) == code


def test_what_one_rank_alone_does_not_see_is_said_by_its_name(tmp_path, monkeypatch) -> None:
    says = """echo '{"message": "r.yaml: no such file"}' > "$TORCHELASTIC_ERROR_FILE"; exit 2"""
    with pytest.raises(CompressError, match=r"rank 1: r\.yaml: no such file") as found:
        ended(f"[ $RANK = 1 ] || exec sleep 60\n{says}", tmp_path, monkeypatch)
    assert found.value.exit_code == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(rank, tmp_path, monkeypatch) -> None:
    with pytest.raises(MachineError, match=f"killed: rank {rank} by SIGKILL"):
        ended(f"[ $RANK = {rank} ] || exec sleep 60\nkill -9 $$", tmp_path, monkeypatch)


def test_a_leading_rank_that_said_so_is_not_contradicted(tmp_path, monkeypatch) -> None:
    notes: list[str] = []
    script = "[ $RANK = 0 ] && exit 3\nkill -9 $$"
    assert ended(script, tmp_path, monkeypatch, notes) == 3
    assert notes == ["killed: rank 1 by SIGKILL"]


def test_sigterm_to_the_launcher_reaches_every_rank(tmp_path, monkeypatch) -> None:
    script = f"trap 'touch {tmp_path}/stopped.$RANK; exit 130' TERM\nwhile :; do sleep 0.05; done"
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert ended(script, tmp_path, monkeypatch) == 130
    assert len(list(tmp_path.glob("stopped.*"))) == 2
