"""The layouts that are read as floats."""

import torch

from compressor.checkpoint.low_precision import fp8, gptq_act_order, packed_act_order
from compressor.checkpoint.low_precision.base import Layout, decoded
from compressor.checkpoint.reader import Checkpoint

LAYOUTS: tuple[Layout, ...] = (fp8.LAYOUT, gptq_act_order.LAYOUT, packed_act_order.LAYOUT)


def as_floats(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """The checkpoint as floats in `dtype` (the model's) where a layout here claims it, else itself.

    Raises InputError where its tensors are not what the layout says, or one is left over.
    """
    declared = checkpoint.config.get("quantization_config")
    entry = declared if isinstance(declared, dict) else None
    for layout in LAYOUTS:
        if layout.claims(entry, checkpoint):
            return decoded(checkpoint, layout, entry, dtype or checkpoint.dtype)
    return packed_act_order.without_order(entry, checkpoint)
