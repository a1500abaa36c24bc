"""What a checkpoint folder says, by our own reader and by transformers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from compressor.checkpoint.source import open_source


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of our reading."""
    source = open_source(folder)
    return {
        name: tensor
        for unit in source.layout.units
        for name, tensor in source.read_unit(unit).tensors.items()
    }


def logits(folder: Path) -> torch.Tensor:
    """Of a row of tokens, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(2, 34)[None]).logits
