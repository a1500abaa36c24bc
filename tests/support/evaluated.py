"""What an evaluation of a checkpoint that attends by a policy computes."""

from pathlib import Path

import torch
from torch import Tensor

from compressor.attention.evaluation import policy_attention
from compressor.attention.policy import AttentionPolicy
from compressor.checkpoint.source import open_source
from compressor.runner.sweep import StreamedModel, run_blocks


def evaluated_logits(folder: Path, rules: AttentionPolicy, ids: Tensor) -> Tensor:
    (stream,) = run_blocks(
        [StreamedModel(open_source(folder), policy_attention(rules))],
        ids,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    with stream.logits() as logits:
        return torch.stack([logits(hidden) for hidden in stream.hidden])
