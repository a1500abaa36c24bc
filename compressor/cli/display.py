"""Progress on stderr: a live display in a terminal, plain lines elsewhere, or JSON lines."""

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from compressor.errors import printable
from compressor.report.text import relative_error

LogFormat = Literal["auto", "plain", "json"]

BARS = "▁▂▃▄▅▆▇█"
RECENT = 6
"""Units whose mean time says how long the others will take."""

TOLD_SECONDS = 10.0
"""Between lines about one unit, where they cannot overwrite each other."""


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


def rate(weights: float) -> str:
    """Weights in a second, for people."""
    return (
        f"{weights / 1e6:.1f} M weights/s" if weights < 1e9 else f"{weights / 1e9:.2f} G weights/s"
    )


def sparkline(values: list[float], width: int) -> str:
    """The last values as bars from zero up, the largest the tallest."""
    shown = values[-width:]
    top = max(shown, default=0.0) or 1.0
    return "".join(BARS[min(int(v / top * len(BARS)), len(BARS) - 1)] for v in shown)


class Display:
    """Shows stages of work that go unit by unit."""

    def __init__(self, *, log_format: LogFormat = "auto", file: TextIO | None = None) -> None:
        self.console = Console(stderr=file is None, file=file)
        usable = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = log_format == "auto" and usable
        self.as_json = log_format == "json"
        self.file = file
        self._stage: _Stage | None = None
        if self.as_json:
            # A library's warning is an event like any other.
            warnings.showwarning = lambda message, category, *_: self.event(
                "warning", category=category.__name__, text=str(message)
            )

    def event(self, name: str, **fields: Any) -> None:
        """One thing that happened: a JSON line, or readable text."""
        if self.as_json:
            self._print(json.dumps({"event": name, "time": round(time.time(), 3), **fields}))
        else:
            said = (str(v) if k in ("text", "hint") else f"{k} {v}" for k, v in fields.items())
            text = "  ".join(said)
            self._print(f"{name}: {text}" if text else name)

    def _print(self, text: str) -> None:
        text = printable(text)
        if self.live:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self.file or sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """A stage of `total` units; 0 where that is not known yet."""
        self._stage = stage = _Stage(name, total)
        if not self.live:
            self.event(name, **({"units": total} if total else {}))
            yield
            if self.as_json:
                self.event("stage done", stage=name, seconds=round(stage.spent, 3))
            return
        with Live(
            stage,
            console=self.console,
            refresh_per_second=8,
            transient=True,
            vertical_overflow="crop",
        ):
            yield
        self._print(f"{name}: {stage.done or total} units in {duration(stage.spent)}")

    def unit(self, name: str, done: int, total: int, **fields: Any) -> None:
        """One more unit of the stage is finished; the time left follows from those before."""
        stage = self._stage
        if stage is None:
            return
        stage.finish(name, done, total, fields)
        if self.as_json:
            left = round(stage.left, 1)
            shown: Mapping[str, Any] = {"stage": stage.name, "unit": name, "done": done}
            self.event("unit", **shown, total=total, left_seconds=left, **fields)
        elif not self.live:
            note = "  ".join(described(key, value) for key, value in fields.items())
            note += f"  left {duration(stage.left)}" if done < total else ""
            self._print(f"  [{done}/{total}] {name}  {note.strip()}".rstrip())

    def within(self, name: str, done: int, total: int, loss: float) -> None:
        """How far the unit is that is being worked on; lines are at least some seconds apart."""
        stage = self._stage
        if stage is None:
            return
        text = f"{name}: step {done}/{total}, loss {loss:.4g}"
        if self.live:
            stage.unit, stage.fields = text, {}
            return
        now = time.perf_counter()
        if now - stage.told < TOLD_SECONDS:
            return
        stage.told = now
        if self.as_json:
            said = {"stage": stage.name, "unit": name, "step": done, "steps": total, "loss": loss}
            self.event("fit", **said)
        else:
            self._print(f"  {text}")


class _Stage:
    """What a stage has come to, and how a terminal shows it."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.unit, self.done = "", 0
        self.fields: dict[str, Any] = {}
        self.errors: list[float] = []
        self.told = time.perf_counter()
        self.began = time.perf_counter()
        self.marks = [(self.began, 0)]

    @property
    def spent(self) -> float:
        """Seconds since the stage began."""
        return time.perf_counter() - self.began

    @property
    def left(self) -> float:
        """Seconds that the units to come will take, if they take what the last ones took."""
        recent = self.marks[-RECENT - 1 :]
        (first, before), (last, done) = recent[0], recent[-1]
        return (last - first) / max(done - before, 1) * (self.total - self.done)

    def finish(self, name: str, done: int, total: int, fields: Mapping[str, Any]) -> None:
        if done < self.done:
            # Another count begins.
            self.marks = [(self.marks[-1][0], 0)]
        self.unit, self.done, self.total = name, done, total
        self.fields = dict(fields)
        self.marks.append((time.perf_counter(), done))
        if "error" in fields:
            self.errors.append(float(fields["error"]))

    def __rich__(self) -> RenderableType:
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(self.total, 1), completed=self.done)
        left = f"left {duration(self.left)}" if 0 < self.done < self.total else ""
        head.add_row(
            _safe(self.name, style="bold"),
            bar,
            _safe(f"{self.done}/{self.total}  {duration(self.spent)}  {left}".rstrip()),
        )
        rows: list[RenderableType] = [head]
        if self.unit:
            fields = "".join(f"  {described(key, value)}" for key, value in self.fields.items())
            rows.append(_line((f"  {self.unit}", "cyan"), (fields, "default"), overflow="ellipsis"))
        if len(self.errors) > 1:
            bars = (sparkline(self.errors, 64), "magenta")
            top = (f"  up to {relative_error(max(self.errors))}", "dim")
            rows.append(_line(("  error by unit  ", "dim"), bars, top, overflow="crop"))
        return Group(*rows)


def _safe(text: str, *, style: str = "") -> Text:
    """Text as rich shows it, control characters as escapes."""
    return Text(printable(text), style=style)


def _line(*parts: tuple[str, str], overflow: Literal["crop", "ellipsis"]) -> Text:
    """Text with a style each, on one line of the terminal."""
    line = Text(no_wrap=True, overflow=overflow)
    for text, style in parts:
        line.append_text(_safe(text, style=style))
    return line


def described(key: str, value: Any) -> str:
    """A field of a unit in words."""
    if key in ("memory", "device"):
        return f"{key} {size(value)}"
    if key == "seconds":
        return duration(value)
    if key == "rate":
        return rate(value)
    if key == "error":
        return f"{key} {relative_error(value)}"
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
