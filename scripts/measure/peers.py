"""Other programs, where their packages are installed, on a model and calibration rows of ours.

Each writes a model whose blocks' linears hold what their rounded weights are worth, or their codes,
into a folder. What is not given is the program's own default. They raise RuntimeError without the
package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
Grid = Mapping[str, Any]
"""`bits`, `group_size`, and `symmetric` where it is not."""


def run_autoround(
    model: Path, rows: Tensor, output: Path, *, grid: Grid, steps: int, device: torch.device
) -> None:
    """AutoRound.

    rows   calibration tokens [rows, length]
    steps  for each block, of eight rows each
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


def run_llm_compressor(
    model: Path, rows: Tensor, output: Path, *, grid: Grid, method: str, device: torch.device
) -> None:
    """llm-compressor's `gptq` or `awq` (AWQ searches no clipping there)."""
    try:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
    except ImportError as error:
        raise RuntimeError("llm-compressor is not installed: pip install llmcompressor") from error
    if device.type == "cpu":
        # Its cache of activations asks for pinned memory, which needs an accelerator.
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign, assignment]
    weights = {
        "num_bits": grid["bits"],
        "type": "int",
        "symmetric": grid.get("symmetric", True),
        "strategy": "group",
        "group_size": grid["group_size"],
    }
    groups = {"blocks": {"targets": ["Linear"], "weights": weights}}
    rounding = {"ignore": ["lm_head"], "config_groups": groups}
    if method == "gptq":
        recipe = [GPTQModifier(**rounding)]
    else:
        recipe = [AWQModifier(), QuantizationModifier(**rounding)]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    count, length = rows.shape
    oneshot(
        model=loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_dict(
            {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
        ),
        recipe=recipe,
        batch_size=BATCH,
        max_seq_length=length,
        num_calibration_samples=count,
    )
    loaded.save_pretrained(output, save_compressed=True)


def run_gptqmodel(
    model: Path, rows: Tensor, output: Path, *, grid: Grid, method: str, device: torch.device
) -> None:
    """GPTQModel's `gptq` or `awq`."""
    try:
        from gptqmodel import GPTQModel, QuantizeConfig
    except ImportError as error:
        raise RuntimeError("GPTQModel is not installed: pip install gptqmodel") from error
    config = QuantizeConfig(
        bits=grid["bits"],
        group_size=grid["group_size"],
        sym=grid.get("symmetric", True),
        method=method,
    )
    loaded = GPTQModel.load(str(model), config, device=str(device))
    loaded.quantize(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows.tolist()],
        batch_size=BATCH,
    )
    loaded.save(str(output))
