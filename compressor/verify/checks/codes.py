"""Two readers that share no code see the same weights."""

from compressor.ir.layout import Linear
from compressor.verify.checks.base import Check
from compressor.verify.findings import LayerVerdict
from compressor.verify.kernels.layer import Layer


class Codes(Check):
    """Each packed layer decodes to one weight."""

    def layer(self, linear: Linear, layer: Layer | str) -> None:
        self.found.layers[linear.name] = LayerVerdict(linear=linear.name)
        if isinstance(layer, str):
            self.problems.append(layer)

    def unread(self, problem: str) -> None:
        if self.subject.from_base is None:
            self.problems.append(problem)

    def conclude(self) -> None:
        count = len(self.found.layers)
        detail = f"{count} layers, by a reader that shares no code with the writer"
        self.found.add(self.subject.coding, self.problems, detail)
