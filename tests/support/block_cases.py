"""Rules of choosing blocks that suit the rows of tiny models, and forecasts to choose them by."""

from pathlib import Path

import torch
from compressor_kernels.attention.block_windows import WindowRule
from safetensors.torch import load_file, save_file

from compressor.attention.rules.forecast import ForecastBlocks
from compressor.attention.rules.infllm import InfLLMBlocks
from compressor.attention.rules.quest import QuestPages

SMALL = {"kernel_size": 4, "stride": 2, "init_blocks": 1, "local_blocks": 1, "top_k": 4}
FINE = WindowRule(kernel_size=2, stride=1)
"""What a teacher looks through."""

SELECTIONS = {
    "infllm": InfLLMBlocks(block_size=8, **SMALL),
    "quest": QuestPages(block_size=8, init_blocks=0, local_blocks=0, top_k=4, per="query_head"),
    "quest by KV head": QuestPages(block_size=8, init_blocks=0, local_blocks=0, top_k=4),
    "forecast": ForecastBlocks(block_size=8, **SMALL),
}


def with_forecasts(folder: Path, *, seed: int = 0) -> Path:
    """The checkpoint with random forecasts beside its weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.{i}.self_attn.q_future_proj.weight" for i in range(2)]
    for name in [*names, "model.layers.0.self_attn.q_curr_proj.weight"]:
        tensors[name] = torch.randn(32, 64, generator=generator) / 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
