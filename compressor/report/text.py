"""Numbers as a report writes them."""

import math
from collections.abc import Mapping
from typing import Any

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
PLACES = 6
"""After the point, of a number that is not written with an exponent."""


def number(value: float | None) -> str:
    """Four significant digits; a dash where there is no number."""
    if value is None:
        return MISSING
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def relative_error(value: float | None) -> str:
    """Three digits and an exponent, so that those of a table compare at a glance."""
    if not value:
        return MISSING if value is None else "0"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def rounded(value: float, error: float) -> tuple[str, str]:
    """A value to the place of the second digit of its standard error, and that error."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return number(value), ""
    # Of the error as it is printed: 0.0996 is 0.10, whose second digit is a hundredth.
    place = 1 - int(f"{error:.1e}".partition("e")[2])
    if place > PLACES:
        return number(value), f"{error:.1e}"
    return f"{value:,.{max(place, 0)}f}", f"{error:,.{max(place, 0)}f}"


def with_error(estimate: Mapping[str, Any]) -> str:
    """A value with its standard error, as many digits as that leaves."""
    if estimate["value"] is None:
        return MISSING
    value, error = rounded(estimate["value"], estimate.get("error") or 0.0)
    return f"{value} ± {error}" if error else value


def figure(estimate: Mapping[str, Any]) -> str:
    """A value without its standard error, to the digits that it leaves."""
    return with_error(estimate).partition(" ± ")[0]


def share_with_error(estimate: Mapping[str, Any]) -> str:
    """A share of one as a percentage with its standard error."""
    if estimate["value"] is None:
        return MISSING
    value, error = rounded(100 * estimate["value"], 100 * (estimate.get("error") or 0.0))
    return f"{value}% ± {error}%" if error else share(estimate["value"])


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
