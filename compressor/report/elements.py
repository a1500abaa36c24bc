"""Pieces of HTML that a report is made of."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_name("template.html")
"""A page: $title and $body."""


def page(title: str, parts: Iterable[str]) -> str:
    """A page of parts that are HTML already, those that are empty left out."""
    template = Template(TEMPLATE.read_text("utf-8"))
    return template.substitute(title=escape(title), body="\n".join(filter(None, parts)))


def breakable(name: str) -> str:
    """A module path that may break after its dots."""
    return escape(name).replace(".", ".<wbr>")


def section(title: str, body: str) -> str:
    """A part of the page under a heading; the body is HTML already."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def mark(passed: bool) -> str:
    """A badge for a verdict."""
    return (
        f'<span class="badge {"good" if passed else "bad"}">{"ok" if passed else "failed"}</span>'
    )


def meter(part: float) -> str:
    """A bar that is filled up to a share of 0 to 1."""
    return f'<span class="meter"><i style="width:{max(0.0, min(part, 1.0)):.1%}"></i></span>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Iterable[int] = (),
    names: Iterable[int] = (),
    texts: Iterable[int] = (),
) -> str:
    """A table of cells that are HTML already; `names` and `texts` may break anywhere."""
    numbers, names = tuple(numbers), tuple(names)
    kinds = {
        **dict.fromkeys(numbers, ' class="n"'),
        **dict.fromkeys(names, ' class="name"'),
        **dict.fromkeys(texts, ' class="text"'),
    }
    head = "".join(f"<th{kinds.get(i, '')}>{cell}</th>" for i, cell in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{kinds.get(i, '')}>{c}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if header else ""
    narrow = ' class="compact"' if header and numbers and not names else ""
    return f'<div class="scroll"><table{narrow}>{top}<tbody>{body}</tbody></table></div>'
