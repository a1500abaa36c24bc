"""What a check of written files is."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from compressor.ir.layout import Linear, UnitLayout
from compressor.verify.findings import Findings
from compressor.verify.kernels.layer import Layer
from compressor.verify.subject import Subject


class Check:
    """One check of one subject. It is shown units in order, each once, and says what it found.

    A subclass has those of the methods below that it needs; complaints go to `problems`. Ranks may
    share units: then one check of each is shown some, and what all of them gathered is put together
    in the units' order before `conclude`.
    """

    gathers: ClassVar[tuple[str, ...]] = ("problems",)
    """Lists that units add to."""

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

    def over(self, unit: UnitLayout) -> None:
        """A unit is done with, read or not."""

    def conclude(self) -> None:
        """After the last unit."""

    def gathered(self) -> list[list[Any]]:
        """What units added since this was asked last, which is taken out."""
        found = [getattr(self, name) for name in self.gathers]
        for name in self.gathers:
            setattr(self, name, [])
        return found

    def put(self, gathered: list[list[Any]]) -> None:
        """Add what `gathered` gave."""
        for name, more in zip(self.gathers, gathered, strict=True):
            getattr(self, name).extend(more)
