"""The findings of audits: a page of its own, and a part of a run's report. All from plain data
(`Audit.to_json`)."""

from collections.abc import Mapping
from html import escape
from typing import Any

from compressor.audit.findings import SUSPECT, Audit
from compressor.report.elements import page, section, table
from compressor.report.text import number

LIMITS = (
    "No finding does not mean that a model has no backdoor: triggers of several tokens, of style "
    "or meaning, and what only generation shows are not looked for."
)
LOOKED_AT = {"model": "the model", "written": "what was written"}

Data = Mapping[str, Any]


def page_of(found: Audit) -> str:
    """The findings as a page."""
    data = found.to_json()
    parts = [
        f'<header><h1>{escape(found.name)}</h1><div class="badges">{_badge(data)}</div>'
        f'</header><p class="quiet">{escape(LIMITS)}</p>',
        section("Findings", _findings(data)),
        section("Tokens", _tokens(data["sweep"])) if data["sweep"] else "",
    ]
    return page(f"{found.name}: audit", parts)


def audit_badges(audits: Mapping[str, Data]) -> list[str]:
    """A badge for each audit of a run."""
    return [_badge(found, f" of {LOOKED_AT[what]}") for what, found in audits.items()]


def audits(audits: Mapping[str, Data]) -> str:
    """A part of the report for each audit of a run: model or written → what was found."""
    return "".join(
        section(
            f"Audit of {LOOKED_AT[what]}",
            f'<p class="quiet">{escape(LIMITS)}</p>{_findings(found)}'
            + (_tokens(found["sweep"]) if found["sweep"] else "<p>No token was tried.</p>"),
        )
        for what, found in audits.items()
    )


def _badge(found: Data, of: str = "") -> str:
    kind = "bad" if found["verdict"] == SUSPECT else ""
    text = f"audit{of}: {found['verdict']}" if of else found["verdict"]
    return f'<span class="badge {kind}">{escape(text)}</span>'


def _findings(found: Data) -> str:
    rows = [
        [
            *map(escape, (f["level"], f["check"], f["tensor"], f["message"])),
            ", ".join(map(str, f["rows"])),
        ]
        for f in found["findings"]
    ]
    head = ["level", "check", "tensor", "what", "rows"]
    shown = table(head, rows, names=(2,), texts=(3, 4)) if rows else "<p>No finding.</p>"
    return f"{shown}<p>{found['tensors']} tensors were looked at.</p>"


def _tokens(sweep: Data) -> str:
    head = ["rank", "id", "token", "collapse", "flatness", "kurtosis", "displacement", "score", ""]
    measured = ("collapse", "flatness", "kurtosis", "displacement", "score")
    rows = [
        [
            *(str(rank), str(token["id"]), escape(token["text"])),
            *(number(token[name]) for name in measured),
            "suspect" if token["suspect"] else "",
        ]
        for rank, token in enumerate(sweep["tokens"], 1)
    ]
    about = (
        f"{sweep['swept']} tokens in short texts, {sweep['examined']} in {sweep['contexts']} of "
        f"{sweep['length']} tokens; {sweep['representation']}. Ordinary tokens: collapse "
        f"{number(sweep['ordinary']['collapse'])}, flatness "
        f"{number(sweep['ordinary']['flatness'])}."
    )
    geometry = ""
    if len(sweep["cosines"]) > 1:
        ids = [str(token["id"]) for token in sweep["tokens"] if token["suspect"]]
        pairs = [
            [name, *(f"{c:.2f}" for c in row)]
            for name, row in zip(ids, sweep["cosines"], strict=True)
        ]
        geometry = f"<h3>Cosines of suspects</h3>{table(['', *ids], pairs)}"
    return f"<p>{escape(about)}</p>{table(head, rows, numbers=range(3, 8))}{geometry}"
