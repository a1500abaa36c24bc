"""What a measurement declares: variants, each measured into figures."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]
"""Name → a number or, for a standard error over windows, a number for each window: `nll` is shown
as perplexity, what begins with `nll ` as that of one kind of text."""


@dataclass(frozen=True)
class Variant:
    """One row.

    settings  what it follows from: a row that was kept from other settings is measured again
    baseline  the row that its windows are compared with
    """

    name: str
    measure: Callable[[], Figures]
    settings: Any = None
    baseline: str = ""


@dataclass(frozen=True)
class Bench:
    """Where a measurement is made; `work` is a folder that does not outlive it."""

    options: argparse.Namespace
    device: torch.device
    work: Path
