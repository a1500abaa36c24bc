"""Rotary position embeddings of queries, keys and forecasts (RoFormer, arXiv 2104.09864)."""

import torch
from torch import Tensor

from compressor.runner.attention_call import Rotary as Rotary


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """x [rows, heads, length, head_dim] rotated by tables [length, channels], halves paired as in
    Llama; channels beyond the tables stay. Computed in float32."""
    cos, sin = (table.to(x.device, torch.float32) for table in rotary)
    turning, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :]
    a, b = turning.chunk(2, dim=-1)
    out = turning * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([out.to(x.dtype), rest], dim=-1)


def rotated_back(x: Tensor, by: Tensor, rotary: Rotary) -> Tensor:
    """What x [rows, heads, length, head_dim] would be `by` [length] positions earlier.

    rotary  tables of all positions; a factor that a scaled embedding puts on them is taken out, as
            x carries it already
    """
    cos, sin = rotary
    factor = cos[0]
    return rotated(x, (cos[by] / factor, -sin[by] / factor))
