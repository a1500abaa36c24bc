"""The source model for model passes: read unit by unit, or whole where gradients need its depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.source import Source
from compressor.ir.layout import ModelLayout
from compressor.ir.unit import Unit
from compressor.runner.block_runner import BlockRunner
from compressor.runner.sweep import floats
from compressor.runner.tokenizer import load_tokenizer


class SourceModel:
    """The source as methods that learn see it; its weights are never changed.

    runner  the BlockRunner that runs its blocks one at a time
    """

    def __init__(self, source: Source, *, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.layout: ModelLayout = source.layout
        self.config: Mapping[str, Any] = source.checkpoint.config
        self.device = device
        self.dtype = dtype
        self.runner: Any = self._new_runner()

    def _new_runner(self) -> BlockRunner:
        return BlockRunner(
            self.config, self.source.arch.runtime, device=self.device, dtype=self.dtype
        )

    def tokenizer(self) -> Any:
        """The model's own tokenizer. Raises InputError where there is none."""
        return load_tokenizer(self.source.checkpoint.folder)

    def read_unit(self, index: int) -> Unit:
        """A unit's weights, on the CPU."""
        return self.source.read_unit(self.layout.unit(index))

    def tensors(self, index: int) -> dict[str, Tensor]:
        """A unit's weights in float on the device, as the runner takes them."""
        found = floats(self.read_unit(index), self.runner)
        return {name: tensor.to(self.device, self.dtype) for name, tensor in found.items()}

    def whole(self) -> Any:
        """A transformers model with all weights on the device, in evaluation mode; none of its
        parameters requires a gradient."""
        # A model of its own: a pass may hook into it, and the runner's stays as it is.
        runner = self._new_runner()
        runner.fill((unit, self.tensors(i)) for i, unit in enumerate(self.layout.units))
        return runner.model
