"""What methods check before they learn which heads stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from compressor.attention.policy import attention_shape, check_policy
from compressor.attention.rules.streaming import streaming_policy
from compressor.errors import InputError
from compressor.ir.layout import ModelLayout


def undescribed(layout: ModelLayout, *, sinks: int, window: int) -> Iterator[InputError]:
    """Why no policy can say of this model which of its KV heads stream."""
    try:
        heads = torch.ones(len(layout.blocks), attention_shape(layout).kv_heads, dtype=torch.bool)
        check_policy(streaming_policy(layout, heads, sinks=sinks, window=window), layout)
    except InputError as error:
        yield error
