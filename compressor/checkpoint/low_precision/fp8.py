"""FP8 weights with one scale, one for each output, one for each block, or none.

X.weight           float8_e4m3fn or float8_e5m2 [out, in]
X.weight_scale_inv, X.weight_scale, X.scale
                   a multiplier in every case, whatever the name: () or [1], [out] or [out, 1], or
                   [ceil(out/r), ceil(in/c)] for blocks of r x c, the last ones short; float32,
                   bfloat16, or an exponent (float8_e8m0fnu, uint8 with bias 127)
The block's size is the config's and not what divides evenly: transformers 5.24 takes a grid of
2 x 3 over 200 x 300 for blocks of 100 x 100, and is wrong there.
Without a scale and without a declaration the values are the weights (raw FP8).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.low_precision.base import Stored
from compressor.checkpoint.low_precision.four_bit_experts import four_bit_experts
from compressor.checkpoint.reader import Checkpoint
from compressor.errors import InputError
from compressor.formats.fp8.codec import FORMAT
from compressor.ir.layout import weight_name

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
METHODS = ("fp8", "fbgemm_fp8", "w4afp8")
DEFAULT_BLOCK = (128, 128)
SUFFIXES = ("_scale_inv", "_scale")


class FP8Weights:
    """`quant_method: fp8` as DeepSeek and Qwen publish it, and FP8 that nothing declares."""

    inert: tuple[str, ...] = (
        "input_scale",
        "activation_scale",
        "input_scale_ub",
        "k_scale",
        "v_scale",
    )

    def claims(self, declared: Mapping[str, Any] | None, checkpoint: Checkpoint) -> bool:
        """Any FP8 tensor, where the declaration is fp8's or there is none; what is written here
        is read as codes."""
        if declared is not None and FORMAT.recognises(declared):
            return False
        method = None if declared is None else declared.get("quant_method")
        known = declared is None or method in METHODS
        entries = checkpoint.entries
        coded = any(entry.spec.dtype in FP8 for entry in entries.values())
        return known and (coded or (declared is not None and bool(four_bit_experts(entries))))

    def describe(self, declared: Mapping[str, Any] | None) -> str:
        """fp8, and the size of its blocks."""
        if declared is None:
            return ""
        block = _stated_block(declared)
        return "fp8" if block is None else f"fp8 in blocks of {block[0]} x {block[1]}"

    def stored(
        self, declared: Mapping[str, Any] | None, checkpoint: Checkpoint
    ) -> dict[str, Stored]:
        """Every FP8 tensor with its scale.

        Raises InputError for a scale that is missing where others have one or the config says
        so, and for one whose shape fits no block.
        """
        entries = checkpoint.entries
        block = None if declared is None else _stated_block(declared)
        found = {} if declared is None else four_bit_experts(entries)
        bare: list[str] = []
        for name in [n for n, entry in entries.items() if entry.spec.dtype in FP8]:
            candidates = [name + suffix for suffix in SUFFIXES]
            if name == weight_name(path := name.rpartition(".")[0]):
                candidates.append(f"{path}.scale")
            scales = [n for n in candidates if n in entries]
            if len(scales) > 1:
                raise InputError(f"{name} has two scales: {' and '.join(scales)}")
            shape = entries[name].spec.shape
            if not scales:
                bare.append(name)
                found[name] = Stored({"weight": name}, shape, lambda parts: parts["weight"].float())
                continue
            if entries[scales[0]].spec.dtype in FP8:
                raise InputError(f"{scales[0]} is itself float8: it is not known as a scale")
            size = _block(scales[0], entries[scales[0]].spec.shape, shape, block)
            decode = partial(_scaled, size=size)
            found[name] = Stored({"weight": name, "scale": scales[0]}, shape, decode)
        if bare and (declared is not None or len(bare) < len(found)):
            raise InputError(
                f"{bare[0]} is float8, but has no scale"
                + (" though config.json declares fp8" if declared is not None else ""),
                hint="if its values are the weights, remove quantization_config from config.json; "
                "else a shard or the scales are missing",
            )
        return found


def _scaled(parts: Mapping[str, Tensor], *, size: tuple[int, int]) -> Tensor:
    """A weight times its scale, in float32.

    size  rows and columns that one scale is for
    """
    weight, scale = parts["weight"].float(), multiplier(parts["scale"])
    if scale.numel() == 1:
        return weight * scale.reshape(())
    grid = scale.reshape(scale.shape[0], -1)
    for row in range(grid.shape[0]):
        rows = weight[row * size[0] : (row + 1) * size[0]]
        rows *= grid[row].repeat_interleave(size[1])[: weight.shape[1]]
    return weight


def multiplier(scale: Tensor) -> Tensor:
    """A stored scale in float32; bytes are exponents with bias 127. Raises InputError for NaN."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    value = scale.float()
    if not bool(value.isfinite().all()):
        raise InputError("its scale is not finite", hint="the checkpoint is damaged")
    return value


def _stated_block(declared: Mapping[str, Any]) -> tuple[int, int] | None:
    block = declared.get("weight_block_size")
    if block is None:
        return None
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or any(type(n) is not int or n < 1 for n in sizes):
        raise InputError(f"quantization_config.weight_block_size is {block!r}, not two counts")
    return sizes[0], sizes[1]


def _block(
    name: str, scale: tuple[int, ...], weight: tuple[int, ...], stated: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns for which one scale of this shape is."""
    rows, columns = weight if len(weight) == 2 else (1, int(torch.Size(weight).numel()))
    if torch.Size(scale).numel() == 1:
        return rows, columns
    if len(weight) == 2 and len(scale) == 2:
        for size in (stated,) if stated is not None else (DEFAULT_BLOCK,):
            if scale == (-(-rows // size[0]), -(-columns // size[1])):
                return size
    if len(weight) == 2 and scale in ((rows,), (rows, 1)):
        return 1, columns
    blocks = f"blocks of {list(stated or DEFAULT_BLOCK)}"
    raise InputError(
        f"{name} has shape {list(scale)}, which for a weight of {list(weight)} is neither one "
        f"scale, nor one for each output, nor one for each of {blocks}",
        hint="quantization_config.weight_block_size says the blocks' size",
    )


LAYOUT = FP8Weights()
