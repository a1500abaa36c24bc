"""Plots of the report as inline SVG: no script, colours from the page, drawn once for narrow and
once for wide screens so that text keeps its size."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
NARROW, WIDE = 340, 980
HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 12, 40
APART = 34
"""From the middle of a label to that of the next."""

FEW = 16
"""Points that are drawn large."""

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a series; `label` is shown when the pointer rests on it."""

    x: float
    y: float
    label: str


Series = Mapping[str, Sequence[Point]]
"""Name → points, in the order of the legend."""


def dots(series: Series, *, x_title: str, y_title: str, show: Format) -> str:
    """Points over a logarithmic axis, one colour for each series."""

    def draw(axes: _Axes, series: Series) -> str:
        radius = 3.5 if axes.width == WIDE else 2.5
        if sum(map(len, series.values())) <= FEW:
            radius *= 2
        return "".join(_dots(axes, points, i, radius) for i, points in enumerate(series.values()))

    return _figure(series, draw, x_title=x_title, y_title=y_title, show=show, log=True)


def lines(
    series: Series,
    *,
    x_title: str,
    y_title: str,
    show: Format,
    log: bool = False,
) -> str:
    """One line for each series."""

    def draw(axes: _Axes, series: Series) -> str:
        drawn = []
        for i, points in enumerate(series.values()):
            path = " ".join(f"{axes.x(p.x):.1f},{axes.y(p.y):.1f}" for p in points)
            drawn.append(f'<polyline class="l{i % COLOURS}" points="{path}"/>')
            drawn.append(_dots(axes, points, i, 2.5))
        return "".join(drawn)

    return _figure(series, draw, x_title=x_title, y_title=y_title, show=show, log=log)


def columns(series: Series, *, x_title: str, y_title: str, show: Format) -> str:
    """One column for each point of the one series, from zero up."""

    def draw(axes: _Axes, series: Series) -> str:
        (points,) = series.values()
        step = (axes.width - LEFT - RIGHT) / max(len(points), 1)
        width = max(1.0, min(step * 0.72, 48))
        return "".join(
            f'<rect class="c0" x="{axes.x(p.x) - width / 2:.1f}" y="{axes.y(p.y):.1f}" '
            f'width="{width:.1f}" height="{max(axes.y(0) - axes.y(p.y), 0):.1f}" rx="2">'
            f"<title>{escape(p.label)}</title></rect>"
            for p in points
        )

    return _figure(series, draw, x_title=x_title, y_title=y_title, show=show, log=False, margin=0.5)


@dataclass(frozen=True, slots=True)
class _Axes:
    """Where values lie in a picture."""

    width: int
    low: tuple[float, float]
    high: tuple[float, float]
    log: bool

    def x(self, value: float) -> float:
        span = self.high[0] - self.low[0] or 1.0
        return LEFT + (value - self.low[0]) / span * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low[1], self.high[1]
        if self.log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, low, high))
        share = (value - low) / ((high - low) or 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _figure(
    series: Series,
    draw: Callable[[_Axes, Series], str],
    *,
    x_title: str,
    y_title: str,
    show: Format,
    log: bool,
    margin: float = 0.0,
) -> str:
    floor = 0.0 if log else -math.inf
    kept = {
        name: [p for p in each if math.isfinite(p.y) and p.y > floor]
        for name, each in series.items()
    }
    points = [p for each in kept.values() for p in each]
    if not points:
        return '<p class="quiet">There is nothing to draw.</p>'
    ticks = _decades(points) if log else _steps(max(p.y for p in points))
    low = (min(p.x for p in points) - margin, ticks[0])
    high = (max(p.x for p in points) + margin, ticks[-1])
    pictures = []
    for width, name in ((NARROW, "narrow"), (WIDE, "wide")):
        axes = _Axes(width=width, low=low, high=high, log=log)
        pictures.append(
            f'<svg class="{name}" viewBox="0 0 {width} {HEIGHT}" role="img" '
            f'aria-label="{escape(y_title)} by {escape(x_title)}">'
            f"{_grid(axes, ticks, show)}{_x_labels(axes, points)}"
            f'<text class="axis" x="{(LEFT + width - RIGHT) / 2}" y="{HEIGHT - 4}" '
            f'text-anchor="middle">{escape(x_title)}</text>{draw(axes, kept)}</svg>'
        )
    caption = f"<figcaption>{escape(y_title)}</figcaption>"
    return f"<figure>{caption}{_legend(kept)}{''.join(pictures)}</figure>"


def _dots(axes: _Axes, points: Sequence[Point], series: int, radius: float) -> str:
    return "".join(
        f'<circle class="c{series % COLOURS}" cx="{axes.x(p.x):.1f}" cy="{axes.y(p.y):.1f}" '
        f'r="{radius}"><title>{escape(p.label)}</title></circle>'
        for p in points
    )


def _legend(series: Series) -> str:
    entries = (
        f'<span><i class="b{i % COLOURS}"></i>{escape(name)}</span>'
        for i, name in enumerate(series)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _grid(axes: _Axes, ticks: Sequence[float], show: Format) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{axes.width - RIGHT}" y1="{axes.y(t):.1f}" '
        f'y2="{axes.y(t):.1f}"/><text class="axis" x="{LEFT - 8}" y="{axes.y(t) + 4:.1f}" '
        f'text-anchor="end">{escape(show(t))}</text>'
        for t in ticks
    )


def _x_labels(axes: _Axes, points: Sequence[Point]) -> str:
    values = sorted({p.x for p in points})
    room = max(2, (axes.width - LEFT - RIGHT) // 44)
    step = max(1, math.ceil(len(values) / room))
    shown: list[float] = []
    for value in values[::step]:  # those that are not evenly spaced may still be close
        if not shown or axes.x(value) - axes.x(shown[-1]) >= APART:
            shown.append(value)
    return "".join(
        f'<text class="axis" x="{axes.x(v):.1f}" y="{HEIGHT - BOTTOM + 16}" '
        f'text-anchor="middle">{v:{".3g" if v % 1 else "g"}}</text>'
        for v in shown
    )


def _decades(points: Sequence[Point]) -> list[float]:
    """Powers of ten around all values; where they span little, also twice and five times these."""
    least, most = min(p.y for p in points), max(p.y for p in points)
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    if high - low <= 2:
        marks = [m * 10.0**e for e in range(low, high + 2) for m in (1, 2, 5)]
        below = max((i for i, mark in enumerate(marks) if mark <= least), default=0)
        above = next(i for i, mark in enumerate(marks) if mark >= most and i > below)
        return marks[below : above + 1]
    step = max(1, math.ceil((high - low) / 6))
    return [10.0**e for e in range(low, high + step, step)]


def _steps(largest: float) -> list[float]:
    """Four or five round numbers from zero to above the largest value."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(largest / step) + 1)]
