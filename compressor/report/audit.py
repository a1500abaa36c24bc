"""The findings of an audit as a page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from compressor.audit.findings import Audit, TokenSweep
from compressor.checkpoint.durable import write_atomically
from compressor.report.html import TEMPLATE
from compressor.report.text import number

LIMITS = (
    "No finding does not mean that a model has no backdoor: triggers of several tokens, of style "
    "or meaning, and what only generation shows are not looked for."
)


def write_page(path: Path, found: Audit) -> None:
    """Write the page, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    template = Template(TEMPLATE.read_text("utf-8"))
    title = escape(f"{found.name}: audit")
    write_atomically(path, template.substitute(title=title, body=section(found)).encode())


def section(found: Audit) -> str:
    """The page's body."""
    badge = f'<span class="badge {"bad" if found.suspect else ""}">{escape(found.verdict)}</span>'
    rows = [
        [f.level, f.check, f.tensor, f.message, ", ".join(map(str, f.rows))] for f in found.findings
    ]
    parts = [
        f'<header><h1>{escape(found.name)}</h1><div class="badges">{badge}</div></header>',
        f'<p class="quiet">{escape(LIMITS)}</p>',
        f"<section><h2>Findings</h2>{_table(['level', 'check', 'tensor', 'what', 'rows'], rows)}"
        f"<p>{found.tensors} tensors were looked at.</p></section>",
        _tokens(found.sweep) if found.sweep is not None else "",
    ]
    return "\n".join(part for part in parts if part)


def _tokens(sweep: TokenSweep) -> str:
    head = ["rank", "id", "token", "collapse", "flatness", "kurtosis", "displacement", "score", ""]
    rows = [
        [
            *(str(rank), str(token.id), token.text),
            *map(number, (token.collapse, token.flatness, token.kurtosis)),
            *map(number, (token.displacement, token.score)),
            "suspect" if token.suspect else "",
        ]
        for rank, token in enumerate(sweep.tokens, 1)
    ]
    about = (
        f"{sweep.swept} tokens in short texts, {sweep.examined} in {sweep.contexts} of "
        f"{sweep.length} tokens; {sweep.representation}. Ordinary tokens: collapse "
        f"{number(sweep.ordinary['collapse'])}, flatness {number(sweep.ordinary['flatness'])}."
    )
    geometry = ""
    if len(sweep.cosines) > 1:
        ids = [str(token.id) for token in sweep.suspects]
        pairs = [
            [name, *(f"{c:.2f}" for c in row)] for name, row in zip(ids, sweep.cosines, strict=True)
        ]
        geometry = f"<h3>Cosines of suspects</h3>{_table(['', *ids], pairs)}"
    return f"<section><h2>Tokens</h2><p>{escape(about)}</p>{_table(head, rows)}{geometry}</section>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
