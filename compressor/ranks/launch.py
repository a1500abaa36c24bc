"""Starts the ranks of a run on this host, and ends when they have.

Nothing heavy is imported: this process only waits. torchrun does the same and more, on several
hosts, but ends with 1 whatever a rank ended with.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import CompressError, InputError, MachineError
from compressor.ranks.place import ERROR_FILE

LAUNCHER = "COMPRESS_LAUNCHER"
"""The launcher's process id: a rank whose parent is another has lost it."""
MOMENT = 0.1
PATIENCE = 10.0
"""Seconds in which ranks may end by themselves once one has failed."""


class RankError(CompressError):
    """What ended a rank other than the leading one, which did not learn of it."""

    def __init__(self, rank: int, message: str, code: int) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exit_code = code


def launch(world: int, arguments: Sequence[str], note: Callable[[str], None]) -> int:
    """Run `compress` with these arguments in `world` processes; the exit code of all of them.

    note  told which ranks were killed, where the leading one has said that the run failed
    Raises MachineError where a rank was killed, which ends the others, and what another rank than
    the leading one failed by where that one did not come to say it.
    """
    command = [sys.executable, "-m", "compressor", *arguments]
    shared = _environment(world)
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[float] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        _signal(ranks, signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    scratch = Path(tempfile.mkdtemp())
    errors = [scratch / f"{rank}.json" for rank in range(world)]
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(errors[rank])}
            # A session of their own: Ctrl-C reaches them once, from here.
            started = subprocess.Popen(command, env={**shared, **place}, start_new_session=True)
            ranks.append(started)
        codes = _wait(ranks)
        said = {rank: _message(path) for rank, path in enumerate(errors) if path.is_file()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _signal(ranks, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        return 130
    if codes[0] is None or codes[0] == 0:
        for rank, code in enumerate(codes):
            if code is not None and code > 0:
                raise RankError(rank, said.get(rank, f"ended with {code}"), code)
    killed = {rank: -code for rank, code in enumerate(codes) if code is not None and code < 0}
    first = codes[0] or 0
    names = ", ".join(f"rank {r} by {signal.Signals(n).name}" for r, n in killed.items())
    if killed and first <= 0:
        raise MachineError(
            f"killed: {names}",
            hint="the same command continues, also with another number of ranks; SIGKILL is often "
            "the kernel's, where memory ran out",
        )
    if killed and first == MachineError.exit_code:
        note(f"killed: {names}")
    return first


def _message(file: Path) -> str:
    return str(json.loads(file.read_text("utf-8"))["message"])


def _environment(world: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    found = {**os.environ, **meeting, LAUNCHER: str(os.getpid())}
    # Each rank would take all processors. Threads decide bytes on a CPU: whoever sets them keeps
    # them.
    found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    return found


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """How each rank ended; None for those that another's failure did not end, and which are
    killed."""
    failed: float | None = None
    while any(rank.poll() is None for rank in ranks):
        if failed is None and any(rank.poll() for rank in ranks):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > PATIENCE:
            found = [rank.poll() for rank in ranks]
            _signal(ranks, signal.SIGKILL)
            for rank in ranks:
                rank.wait()
            return found
        time.sleep(MOMENT)
    return [rank.wait() for rank in ranks]


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def gpus_here(text: str) -> int:
    """The number of ranks that `--gpus` asks for; `auto` is one for each GPU.

    Raises InputError for what is neither.
    """
    if text == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise InputError(f"--gpus is a number from 1 to 64, or auto, not {text!r}")
    return int(text)
