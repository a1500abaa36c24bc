"""Kernel tests run on the CUDA device, or in Triton's interpreter where there is none.

They also run with poisoned memory: what a kernel forgets to write cannot look right by chance.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any kernel


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, or with the largest value of a dtype that has none."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture(autouse=True)
def poison_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor made without values holds poison instead of leftovers."""

    def poison(owner: object, name: str) -> None:
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: poisoned(make(*args, **kwargs)))

    for name in ("empty", "empty_like", "empty_strided"):
        poison(torch, name)
    for name in ("new_empty", "new_empty_strided"):
        poison(torch.Tensor, name)
