"""Progress on stderr: a live display in a terminal, plain lines elsewhere, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LogFormat = Literal["auto", "plain", "json"]


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class Display:
    """Shows stages of work that go unit by unit."""

    def __init__(self, *, log_format: LogFormat = "auto") -> None:
        self.console = Console(stderr=True)
        self.live = log_format == "auto" and self.console.is_terminal
        self.as_json = log_format == "json"
        self._progress: Progress | None = None
        self._task: Any = None
        self._started = time.perf_counter()
        self._stage = ""

    def event(self, name: str, **fields: Any) -> None:
        """One thing that happened: a JSON line, or readable text."""
        if self.as_json:
            line = {"event": name, "time": round(time.time(), 3), **fields}
            print(json.dumps(line), file=sys.stderr, flush=True)
        else:
            text = "  ".join(f"{key} {value}" for key, value in fields.items())
            self._line(f"{name}: {text}" if text else name)

    def _line(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """A stage of `total` units."""
        self._started, self._stage = time.perf_counter(), name
        if not self.live:
            self.event(name, units=total)
            yield
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=False) as progress:
            self._progress = progress
            self._task = progress.add_task(name, total=total, note="")
            try:
                yield
            finally:
                self._progress = None

    def unit(self, name: str, done: int, total: int, **fields: Any) -> None:
        """One more unit of the stage is finished; the time left follows from those before."""
        spent = time.perf_counter() - self._started
        left = spent / max(done, 1) * (total - done)
        if self.as_json:
            shown: Mapping[str, Any] = {"stage": self._stage, "unit": name, "done": done}
            self.event("unit", **shown, total=total, left_seconds=round(left, 1), **fields)
            return
        note = "  ".join(f"{key} {_value(key, value)}" for key, value in fields.items())
        note += f"  left {duration(left)}" if done < total else ""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=f"{name}  {note}")
        else:
            self._line(f"  [{done}/{total}] {name}  {note}")


def _value(key: str, value: Any) -> str:
    if key in ("memory", "device"):
        return size(value)
    if key == "seconds":
        return duration(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
