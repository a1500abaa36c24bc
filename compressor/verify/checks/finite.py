"""No NaN and no infinity."""

from collections.abc import Mapping

from torch import Tensor

from compressor.verify.checks.base import Check


class Finite(Check):
    """Every value of every float tensor is a number."""

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not _finite(tensor):
                self.problems.append(f"{name} holds NaN or infinity")

    def conclude(self) -> None:
        self.found.add("finite", self.problems, "no NaN and no infinity in any float tensor")


def _finite(tensor: Tensor) -> bool:
    """Whether every value is; in chunks, so that no copy of a large tensor is made."""
    flat, step = tensor.reshape(-1), 1 << (26 if tensor.is_cuda else 20)
    return all(
        bool(flat[start : start + step].float().isfinite().all())
        for start in range(0, flat.numel(), step)
    )
