"""Calls in another process, which imports its libraries once for all of them.

For what libraries read when they are imported (HF_HOME, HF_ENDPOINT), and for children that are
forked from a process which is no test's. As a script it serves the calls: lines of JSON with a
module, a function and its arguments in, lines of JSON with the result out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 1800
"""Seconds for one call."""
ROOT = Path(__file__).resolve().parents[2]


class Elsewhere:
    """Such a process. `elsewhere(function, *arguments)` is what a function of a module in
    tests/support returns there; arguments and result are JSON."""

    def __init__(self, *, folder: Path = ROOT, **environment: str) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        call = [Path(function.__code__.co_filename).stem, function.__name__, arguments]
        print(json.dumps(call), file=self.process.stdin, flush=True)
        ready = select.select([self.process.stdout], [], [], PATIENCE)[0]
        line = self.process.stdout.readline() if ready else ""
        self.errors.seek(0)
        assert line, f"no answer: {self.errors.read()}"
        answer = json.loads(line)
        assert "result" in answer, answer["error"] + self.errors.read()
        return answer["result"]

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with self.process:
            self.process.kill()
        self.errors.close()


def compress(*arguments: str) -> dict[str, Any]:
    """The exit code of a command, and what it wrote."""
    from compressor.cli.main import main

    sys.argv = ["compress", *arguments]
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
    return {"code": code, "out": out.getvalue(), "errors": errors.getvalue()}


def serve() -> None:
    """Answer calls until there are no more."""
    sys.path.insert(0, str(ROOT))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.fsync = lambda handle: None  # as in the tests themselves
    for line in sys.stdin:
        module, function, arguments = json.loads(line)
        try:
            called = getattr(importlib.import_module(f"tests.support.{module}"), function)
            answer = {"result": called(*arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    serve()
