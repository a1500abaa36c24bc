"""What a verification found: checks, one verdict for each packed layer, every complaint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

NAMED = 8
"""Damaged tensors that a check's text names; `damage` has all of them."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One thing that was checked: `detail` says what was found, or what is wrong."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """One packed layer.

    kernel        kernel that its product ran through, or "" where there is none
    triton        whether the Triton code ran (else its plain reference alone)
    kernel_error  relative RMS error of the product to float64
    error         ‖written − original‖ / ‖original‖ with exact rescalings undone, or None
    """

    linear: str
    kernel: str = ""
    triton: bool = False
    kernel_error: float | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class BlockVerdict:
    """What a block computes from the original's own states on held-out text.

    error    median over tokens of ‖written − original‖ / ‖original‖ of what it adds to them
    nearest  the same for the original rounded to nearest in the written form, after the exact
             rescalings and rotations that the written weights have
    """

    block: str
    error: float
    nearest: float


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The verdict. `damage` is every complaint, each with the name of the tensor or file; `blocks`
    is empty where there was no original."""

    folder: str
    checks: tuple[CheckResult, ...]
    layers: tuple[LayerVerdict, ...]
    damage: tuple[str, ...]
    blocks: tuple[BlockVerdict, ...] = ()

    @property
    def ok(self) -> bool:
        """Every check held."""
        return all(check.ok for check in self.checks)

    @property
    def proves(self) -> str:
        """What holds where every check held, and what was not asked."""
        if any(check.name == "error to the original" for check in self.checks):
            return (
                "the files are whole, and compute what the original computes, but for rounding; "
                "values that a pass learned (gates, scores, forecasts) have no original"
            )
        return (
            "the files are whole and decode to one meaning; not that they are the model they are "
            "named after, which --against ORIGINAL shows"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "proves": self.proves if self.ok else None,
            "checks": [asdict(check) for check in self.checks],
            "layers": [asdict(layer) for layer in self.layers],
            "damage": list(self.damage),
            "blocks": [asdict(block) for block in self.blocks],
        }


class NothingMore(Exception):
    """What was found leaves nothing to check: the report is what there is."""


@dataclass(slots=True)
class Findings:
    checks: list[CheckResult] = field(default_factory=list)
    layers: dict[str, LayerVerdict] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    blocks: list[BlockVerdict] = field(default_factory=list)

    def add(self, name: str, problems: Sequence[str], detail: str) -> None:
        """One check: its problems, or what it found where there are none."""
        self.damage += problems
        if problems:
            more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
            detail = "; ".join(problems[:NAMED]) + more
        self.checks.append(CheckResult(name=name, ok=not problems, detail=detail))

    def take(self, others: Findings) -> None:
        """What was found elsewhere; of layers that is the distance to the original's."""
        self.checks += others.checks
        self.damage += others.damage
        self.blocks += others.blocks
        for name, layer in others.layers.items():
            self.layers[name] = replace(self.layers.get(name, layer), error=layer.error)

    def gathered(self) -> dict[str, LayerVerdict]:
        """The layers so far, which are taken out."""
        found, self.layers = self.layers, {}
        return found

    def report(self, folder: Path) -> VerifyReport:
        return VerifyReport(
            folder=os.fspath(folder),
            checks=tuple(self.checks),
            layers=tuple(self.layers.values()),
            damage=tuple(self.damage),
            blocks=tuple(self.blocks),
        )
