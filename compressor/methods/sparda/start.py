"""What forecasts start from: random values, or what a block itself asks of its keys."""

import math

import torch
from torch import Tensor

from compressor.ir.layout import AttentionShape, UnitLayout

DAMPING = 1e-4


def initial_forecast(outputs: int, inputs: int, *, seed: int) -> Tensor:
    """A forecast before training, [outputs, inputs]: uniform within ±1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(outputs, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)


def mean_queries(unit: UnitLayout, shape: AttentionShape, tensors: dict[str, Tensor]) -> Tensor:
    """The mean query projection of the heads of each KV head, [kv_heads * head_dim, hidden]."""
    linear = next(x for x in unit.linears if x.role in ("attn.q", "attn.qkv"))
    rows = shape.heads * shape.head_dim  # of a fused projection, queries come first
    weight = tensors[linear.weight_name][:rows].float()
    by_group = weight.view(shape.kv_heads, -1, shape.head_dim, weight.shape[1])
    return by_group.mean(1).flatten(0, 1)


class LeastSquares:
    """The linear map from inputs to outputs that has the smallest squared error, slightly damped,
    from any number of pairs."""

    def __init__(self) -> None:
        self._gram = self._cross = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Pairs [..., in] and [..., out]."""
        x, y = (z.reshape(-1, z.shape[-1]).float() for z in (inputs, outputs))
        self._gram = self._gram + (x.T @ x).double()
        self._cross = self._cross + (x.T @ y).double()

    def solve(self) -> Tensor:
        """The map [out, in], float32."""
        damped = self._gram.clone()
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        found: Tensor = torch.linalg.solve(damped, self._cross)
        return found.T.float().contiguous()
