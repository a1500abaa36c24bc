"""AutoRound itself, where its package is installed, on a model and calibration rows of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def run_autoround(
    model: Path,
    rows: Tensor,
    output: Path,
    *,
    grid: Mapping[str, Any],
    steps: int,
    device: torch.device,
) -> None:
    """Write a model whose blocks' linears hold what their rounded weights are worth.

    rows   calibration tokens [rows, length]
    grid   `bits`, `group_size`, and `symmetric` where it is not
    steps  for each block, of eight rows each

    Raises RuntimeError without the package.
    """
    try:
        from auto_round import AutoRound
    except ImportError as error:
        raise RuntimeError("AutoRound is not installed: pip install auto-round") from error
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
        scheme="W4A16",
        bits=grid["bits"],
        group_size=grid["group_size"],
        sym=grid.get("symmetric", True),
        iters=steps,
        seqlen=rows.shape[1],
        nsamples=rows.shape[0],
        batch_size=BATCH,
        dataset=[
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows.split(BATCH)
        ],
        device_map=str(device),
        enable_torch_compile=device.type == "cuda",
        seed=0,
    )
    rounding.quantize()
    rounding.save_quantized(str(output), format="fake")
