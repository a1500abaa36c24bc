"""How a machine runs a job, and what the job tells while it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compressor.errors import Interrupted
from compressor.ranks.ranks import ALONE, Ranks
from compressor.runner.activations import Activations

Progress = Callable[[str, int, int], None]
FitProgress = Callable[[str, int, int, float], None]


@dataclass(frozen=True, slots=True)
class UnitDone:
    """Progress: one more unit is finished.

    rows         what the passes report of its linears
    seconds      wall time of this unit
    peak_rss, peak_device  bytes, of the process so far
    resumed      it was committed by an earlier run
    """

    name: str
    index: int
    total: int
    rows: tuple[Mapping[str, Any], ...]
    seconds: float
    peak_rss: int
    peak_device: int
    resumed: bool = False


@dataclass(slots=True)
class JobSettings:
    """How this machine runs a job.

    batch     rows of calibration tokens in one forward pass, if memory allows
    offload   whether hidden states wait in main memory between blocks
    experts_apart  whether experts wait in main memory, and some at a time are on the device
    activations  where hidden states are kept for other passes and runs
    on_unit   called after each unit
    on_step   called after each step of other work: its name, how many are done, how many there are
    on_note   told what is damaged and therefore done again
    on_fit    told how far a unit is on which a method works long: its name, steps done, how many
              there are, the loss
    stopping  asked between units, and between such steps, whether to stop
    spread    whether a rank has no room for all experts of a block, so that each has some
    ahead     whether the next block is brought to the device while one is worked on
    ranks     the processes that work on the job
    """

    device: torch.device
    batch: int
    offload: bool = False
    experts_apart: bool = False
    activations: Activations | None = None
    on_unit: Callable[[UnitDone], None] = lambda done: None
    on_step: Progress = lambda name, done, total: None
    on_note: Callable[[str], None] = lambda text: None
    on_fit: FitProgress = lambda name, done, total, loss: None
    stopping: Callable[[], bool] = lambda: False
    spread: bool = False
    ahead: bool = False
    ranks: Ranks = ALONE

    @property
    def brought_to(self) -> torch.device | None:
        """Where weights and codes are worked on that wait elsewhere; None where none do."""
        return self.device if self.experts_apart else None

    def check_stop(self) -> None:
        """Raises Interrupted when asked to stop."""
        if self.stopping():
            raise Interrupted
