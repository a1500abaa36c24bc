"""The comparison with an original in a process of its own, beside the other checks.

It alone runs blocks, for which transformers is imported: by itself that takes as long as everything
before it. A process that starts with the command does so while this one reads headers, goes through
the other checks, or converts; threads of one process would take Python from each other.

Both are this program on this machine, and send each other pickled values through pipes. A process
that fails is one that was never there: the comparison is made here then.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from compressor.runner.driver import has_gpu, start_driver

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from compressor.verify.findings import Findings
    from compressor.verify.kernels.ahead import Wanted
    from compressor.verify.subject import Subject

PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from compressor.verify.apart import serve
serve(sys.argv[2], int(sys.argv[3]))
"""


@dataclass(frozen=True, slots=True)
class Compared:
    """What the comparison found.

    begun   before the first unit;  ended  in the end, or None where what begun found leaves
            nothing more to check
    unread  units that could not be read to their end, here or of the original
    """

    begun: Findings
    ended: Findings | None
    unread: tuple[str, ...] = ()


class Apart:
    """The process, as who started it sees it; it ends with the `with`, or with its starter."""

    def __init__(self, device: str) -> None:
        """device  as the command was told"""
        from multiprocessing.connection import Pipe  # with sockets, which `--help` has no use for

        self._pipe, theirs = Pipe()
        environment = dict(os.environ)
        if sys.pycache_prefix is not None:
            environment["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        if not sys.dont_write_bytecode:
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # Its failures are no failures of the command, and what libraries print is no answer.
        said = 2 if "COMPRESS_DEBUG" in os.environ else subprocess.DEVNULL
        told = (json.dumps(sys.path), device, str(theirs.fileno()))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, *told],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for its starter
            )

    def compile(self, wanted: Wanted) -> None:
        """Have kernels compiled, which verification will find."""
        self._send(wanted)

    def compare(self, subject: Subject) -> None:
        """Begin the comparison of a subject."""
        self._send(subject)

    def compared(self) -> Compared | None:
        """What it found, once it has; None where the process did not get there."""
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            found = pickle.loads(self._pipe.recv_bytes())
            if isinstance(found, Compared):
                return found
        return None

    def _send(self, value: Any) -> None:
        # Who cannot be told will have found nothing.
        try:
            self._pipe.send_bytes(pickle.dumps(value))
        except OSError:
            pass
        except (pickle.PicklingError, AttributeError, TypeError):  # as pickle says it of a lambda
            self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Take it away, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def beside_gpu(device: str) -> contextlib.AbstractContextManager[Apart | None]:
    """The process where a command's device is a GPU; none for a CPU, whose cores and memory have
    enough to do."""
    return Apart(device) if has_gpu(device) else contextlib.nullcontext()


def serve(device: str, handle: int) -> None:
    """The process: import what is needed, then do what comes, the comparison last."""
    from multiprocessing.connection import Connection

    pipe = Connection(handle)
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, asked, device), daemon=True).start()
    gc.disable()  # as `cli.importing` does
    import torch

    from compressor.runner.generation_import import import_models
    from compressor.verify.elsewhere import compare
    from compressor.verify.kernels.ahead import CompiledAhead, Wanted

    import_models()
    gc.freeze()
    gc.enable()
    while True:
        value = pickle.loads(asked.get())
        if value.device.index:
            torch.cuda.set_device(value.device)  # where Triton starts kernels
        if not isinstance(value, Wanted):
            break
        CompiledAhead(value)
    pipe.send_bytes(pickle.dumps(compare(value)))
    os._exit(0)


def _listen(pipe: Connection, asked: queue.SimpleQueue[bytes], device: str) -> None:
    """Pass on what is asked; without whoever asks there is nothing to do."""
    with contextlib.suppress(OSError, EOFError):
        asked.put(pipe.recv_bytes())
        # Who asks has the GPU by now: where it is for one process alone, that is not to be this.
        start_driver(device)
        while True:
            asked.put(pipe.recv_bytes())
    os._exit(0)
