"""What a check of written files is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compressor.ir.layout import Linear, UnitLayout
from compressor.verify.findings import Findings
from compressor.verify.kernels.layer import Layer
from compressor.verify.subject import Subject


class Check:
    """One check of one subject. It is shown each unit once, in order, and says what it found.

    A subclass has those of the methods below that it needs; complaints go to `problems`.
    """

    def __init__(self, subject: Subject, found: Findings) -> None:
        self.subject, self.found = subject, found
        self.problems: list[str] = []

    def begin(self) -> None:
        """Before any weight is read."""

    def stored(self, tensors: Mapping[str, Tensor]) -> None:
        """What the folder's own files hold of a unit."""

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """A unit's tensors by their full names on the device, a delta's together with its base's;
        what is carried over is on the CPU here and in `unit`."""

    def layer(self, linear: Linear, layer: Layer | str) -> None:
        """One of the unit's packed layers, or what is wrong with it."""

    def unit(self, unit: UnitLayout, tensors: dict[str, Tensor]) -> None:
        """The whole unit, after its layers."""

    def unread(self, problem: str) -> None:
        """A unit could not be read to its end; there is no `unit` of it."""

    def conclude(self) -> None:
        """After the last unit."""
