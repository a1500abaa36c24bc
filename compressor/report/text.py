"""Numbers as a report writes them."""

from __future__ import annotations

from collections.abc import Mapping

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def number(value: float | None) -> str:
    """Four significant digits; a dash where there is no number."""
    if value is None:
        return MISSING
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def with_error(estimate: Mapping[str, float | None]) -> str:
    """A value with its standard error."""
    return f"{number(estimate['value'])} ± {number(estimate['error'])}"


def share(value: float | None) -> str:
    """A share of one as a percentage."""
    return MISSING if value is None else f"{value * 100:.4g}%"


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def factor(value: float, to: float) -> str:
    """How many times `to` a value is; a dash where that has no meaning."""
    return f"{value / to:.2f}{TIMES}" if to else MISSING


def counted(count: int, what: str) -> str:
    """A count with its noun, which takes an s."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")
