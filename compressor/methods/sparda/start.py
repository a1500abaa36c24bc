"""What forecasts start from: random values, or what a block itself asks of its keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.ir.layout import UnitLayout

DAMPING = 1e-4


def initial_forecast(outputs: int, inputs: int, *, seed: int) -> Tensor:
    """A forecast before training, [outputs, inputs]: uniform within ±1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(outputs, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)


def mean_queries(unit: UnitLayout, tensors: dict[str, Tensor]) -> Tensor:
    """The mean query projection of the heads of each KV head, [kv_heads * head_dim, hidden]."""
    shape = unit.attention
    assert shape is not None
    linear = next(x for x in unit.linears if x.role in ("attn.q", "attn.qkv"))
    rows = shape.heads * shape.head_dim  # of a fused projection, queries come first
    weight = tensors[linear.weight_name][:rows].float()
    by_group = weight.view(shape.kv_heads, -1, shape.head_dim, weight.shape[1])
    return by_group.mean(1).flatten(0, 1)


class LeastSquares:
    """The linear map from inputs to outputs that has the smallest squared error, slightly damped,
    from any number of pairs."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Pairs [..., in] and [..., out]."""
        x, y = (z.reshape(-1, z.shape[-1]).float() for z in (inputs, outputs))
        gram, cross = (x.T @ x).double(), (x.T @ y).double()
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross

    def solve(self) -> Tensor:
        """The map [out, in], float32."""
        assert self._gram is not None
        assert self._cross is not None
        damped = self._gram.clone()
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        found: Tensor = torch.linalg.solve(damped, self._cross)
        return found.T.float().contiguous()
