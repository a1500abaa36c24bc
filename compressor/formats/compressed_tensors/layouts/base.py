"""What a sub-format of compressed-tensors is, and its way of writing down a quantizer."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.scheme import ActivationSpec, Scheme
from compressor.ir.tensor import TensorShape


class CTLayout(Protocol):
    """One value of `format` in a compressed-tensors config; members as in `Format`."""

    format: str

    def holds(self, scheme: Scheme) -> bool:
        """Whether a scheme of this kind is written in this sub-format."""

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a scheme it holds cannot be written for a weight [out, in], or None."""

    def scale_dtype(self, spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
        """Dtype of stored scales: the model's."""
        return model_dtype

    def layout(
        self, spec: QuantSpec, shape: tuple[int, int], *, input: ActivationSpec | None
    ) -> dict[str, TensorShape]: ...

    def encode(
        self, q: QTensor, *, input: ActivationSpec | None, input_scale: Tensor | None
    ) -> dict[str, Tensor]: ...

    def input_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """None where no input has a stored scale."""
        return None

    def owns(self, tensors: Mapping[str, Any]) -> bool:
        """Whether the tensors of one linear, by local name, are in this sub-format."""

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QTensor: ...

    def scheme(self, group: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> Scheme:
        """The scheme of one linear from its config group and header entries."""


def arguments(
    *,
    bits: int,
    type: str,
    symmetric: bool,
    strategy: str,
    dynamic: bool | str = False,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A QuantizationArgs entry, with only the keys that every version of the package knows."""
    return {
        "num_bits": bits,
        "type": type,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": list(block) if block else None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic is True else "minmax",
        "observer_kwargs": {},
    }
