"""Full and streaming heads of a layer in one kernel, where the machine and the step allow it."""

from __future__ import annotations

import torch
from compressor_kernels.attention.head_attention import head_decode, head_prefill
from torch import Tensor

from compressor.attention.serve.attend import Rule
from compressor.attention.serve.cache import Held

DTYPES = (torch.float16, torch.bfloat16)
MAX_DIM = 128


def fits(query: Tensor, rule: Rule) -> bool:
    """Whether the kernels take such queries: half precision, whole heads, no cap and no window of
    the model's own."""
    dim = query.shape[3]
    plain = rule.softcap is None and rule.window is None
    return plain and query.dtype in DTYPES and dim <= MAX_DIM and dim % 8 == 0


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    *,
    streaming: list[int],
    sinks: int,
    window: int,
) -> Tensor:
    """The first chunk of a text: all keys are its own."""
    kinds = torch.zeros(key.shape[1], dtype=torch.bool, device=key.device)
    kinds[streaming] = True
    return head_prefill(
        query, key, value, streaming=kinds, sink=sinks, window=window, scale=rule.scaling
    )


def decode(
    query: Tensor,
    whole: tuple[Tensor, Tensor],
    step: Held,
    rule: Rule,
    *,
    streaming: list[int],
    full: list[int],
) -> Tensor:
    """One token over the split cache: a step's streaming keys are all visible to it."""
    order = torch.tensor([*full, *streaming], dtype=torch.int32, device=query.device)
    return head_decode(query, *whole, step.keys, step.values, order=order, scale=rule.scaling)
