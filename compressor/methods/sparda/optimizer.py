"""Steps that train one forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compressor.methods.sparda.training import Training

BETAS = (0.9, 0.95)
EPSILON = 1e-6


class ForecastOptimizer:
    """One forecast while it is trained."""

    def __init__(self, weight: Tensor, training: Training) -> None:
        self.training = training
        self.weight = weight.float().requires_grad_()
        self._step = 0
        self._adamw = torch.optim.AdamW(
            [self.weight],
            lr=training.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=training.weight_decay,
        )

    def step(self, gradient: Tensor) -> None:
        """Move the weight by its gradient."""
        self._step += 1
        rate, rising = self.training.learning_rate, self.training.warmup
        rate = rate * self._step / rising if self._step <= rising else rate
        self._adamw.param_groups[0]["lr"] = rate
        self.weight.grad = gradient
        torch.nn.utils.clip_grad_norm_([self.weight], self.training.clip)
        self._adamw.step()
