"""Shapes of weights that lie packed, where no map and config tell them."""

import torch

from compressor.checkpoint.reader import Checkpoint
from compressor.errors import InputError


def packed_shape(checkpoint: Checkpoint, path: str) -> tuple[int, int]:
    """[out, in] of a linear's packed weight. Raises InputError for a form that does not tell it."""
    entries = checkpoint.entries
    if f"{path}.weight_shape" in entries:
        rows, columns = checkpoint.read([f"{path}.weight_shape"])[f"{path}.weight_shape"].tolist()
        return int(rows), int(columns)
    for leaf in ("weight", "weight_packed"):
        entry = entries.get(f"{path}.{leaf}")
        if entry is not None and entry.spec.dtype.itemsize == 1 and len(entry.spec.shape) == 2:
            # int8 and FP8 are codes themselves; plain bytes hold two.
            codes = 2 if entry.spec.dtype == torch.uint8 else 1
            return entry.spec.shape[0], codes * entry.spec.shape[1]
    blocks = entries.get(f"{path}.blocks")
    if blocks is not None and len(blocks.spec.shape) == 3:
        rows, groups, half = blocks.spec.shape
        return rows, groups * half * 2
    words, scales = (entries.get(f"{path}.{leaf}") for leaf in ("qweight", "scales"))
    if words is not None and scales is not None and len(words.spec.shape) == 2:
        rows, first = scales.spec.shape[-1], words.spec.shape[0]
        if words.spec.shape[1] != rows:
            return rows, first  # AutoAWQ packs outputs, GPTQ inputs
        bits = (checkpoint.config.get("quantization_config") or {}).get("bits")
        if type(bits) is int and bits > 0:
            return rows, first * 32 // bits
    raise InputError(
        f"{path} is packed in a form that does not tell its shape",
        hint="such a checkpoint is read with its architecture's map alone",
    )
