"""What a run did, as data: report.json with a stable schema, and one report.html drawn from it.

Both stand outside the manifest, since they carry times and what the machine did.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from compressor.checkpoint.durable import write_atomically
from compressor.errors import InputError, MachineError
from compressor.foreign.untrusted import parse_json, read_file
from compressor.ir.frozen import Strict
from compressor.report.attention import attention
from compressor.report.html import render

JSON_NAME = "report.json"
HTML_NAME = "report.html"


class UnitReport(Strict):
    """One unit of the run.

    peak_rss, peak_device  bytes, of the process up to the end of this unit
    rows                   what the passes report: one dict for each linear or site
    """

    name: str
    seconds: float
    peak_rss: int
    peak_device: int = 0
    resumed: bool = False
    rows: tuple[dict[str, Any], ...] = ()


class Costs(Strict):
    """Bytes and seconds, planned or spent; device_bytes is 0 on a CPU."""

    source_bytes: int
    output_bytes: int
    host_bytes: int
    device_bytes: int = 0
    seconds: float


class Peer(Strict):
    """Another checkpoint of the same model, measured on the same tokens.

    bits  of a parameter, all that is stored included
    kl    {"value", "error"}, from the original, in nats
    """

    name: str
    bits: float
    kl: dict[str, float]


class Mixes(Strict):
    """What mixed precision would cost by number of bits, each point (bits of a weight that is
    quantized, scales included; summed error).

    measure  what is summed;  best  mixes, the smallest first;  alike  every group in one form
    this     the mix of this checkpoint, None where that was not measured
    """

    measure: str
    best: tuple[tuple[float, float], ...]
    alike: dict[str, tuple[float, float]]
    this: tuple[float, float] | None = None


class ReportData(Strict):
    """Everything a report says. Fields are added to a schema version, never changed in one.

    title       name of the artefact
    recipe      the resolved recipe
    source      what was read: name, revision, content hash
    format      name of the written format
    parameters  number of weights of the model, or None
    estimates   what `plan` said;  spent  what happened
    phases      wall seconds by phase: run, verify, evaluate …
    verify      verdict on the written files: {"ok": bool, "checks": [{"name", "ok", "detail"}]},
                and whatever else it carries
    evaluation, passkey, gate  `to_json()` of their results
    learned     rows of what passes learned from the whole model, each with its `pass`
    audit       what was audited, "model" or "written" → its `to_json()`
    choices     which key blocks scorers choose, by layer (forecast_recall.json)
    tasks       task of the harness → {"value", "error"}
    peers       other checkpoints of the model, beside which it stands by size and quality
    mixes       what other mixes of bits would cost, where sensitivities were measured
    hashes      what identifies the artefact: name → SHA-256
    machine     what it ran on: name → value
    environment what decided the last bits, as the manifest names it; several where a run went on
                elsewhere
    activations rows that were read from the activation store in place of running them through a
                block, and rows that ran: {"read", "ran"}
    started     ISO 8601 with a time zone
    seal        hash of all of this and of what was judged, by which the next run of the same recipe
                knows that it still holds
    """

    schema_version: Literal[1] = 1
    title: str
    recipe: dict[str, Any]
    source: dict[str, Any]
    format: str
    parameters: int | None = None
    units: tuple[UnitReport, ...] = ()
    learned: tuple[dict[str, Any], ...] = ()
    estimates: Costs
    spent: Costs
    phases: dict[str, float] = Field(default_factory=dict)
    verify: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    passkey: dict[str, Any] | None = None
    choices: dict[str, Any] | None = None
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    gate: dict[str, Any] | None = None
    peers: tuple[Peer, ...] = ()
    mixes: Mixes | None = None
    audit: dict[str, dict[str, Any]] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    hashes: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str] = Field(default_factory=dict)
    environment: tuple[dict[str, str], ...] = ()
    activations: dict[str, int] | None = None
    started: str = ""
    seal: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data in which a number that is not finite is null."""
        found: dict[str, Any] = json.loads(self.model_dump_json())
        return found


def write_report(folder: Path, data: ReportData) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder`; the paths of both.

    Raises MachineError where they cannot be written.
    """
    plain = data.to_json()
    files = {
        JSON_NAME: json.dumps(plain, indent=1, allow_nan=False) + "\n",
        HTML_NAME: render(plain, attention=attention(folder)),
    }
    try:
        for name, text in files.items():
            write_atomically(folder / name, text.encode())
    except OSError as error:
        raise MachineError(
            f"cannot write the report into {os.fspath(folder)}: {error.strerror or error}"
        ) from error
    return folder / JSON_NAME, folder / HTML_NAME


def read_report(folder: Path) -> ReportData | None:
    """The report in a checkpoint folder; None where there is none that can be read."""
    try:
        data = read_file(folder / JSON_NAME, what="report")
        return ReportData.model_validate(parse_json(data))
    except (InputError, ValueError):
        return None
