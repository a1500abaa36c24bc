"""Attention policies that choose blocks, and the `sparse_config` that runtimes read them from.

attention_policy.json is the truth; the entry of config.json says the same in the form that
MiniCPM4's and SparDA's serving code read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from compressor.attention.key_blocks import rules
from compressor.attention.policy import AttentionPolicy, BlockSelection, LayerPolicy, check_policy
from compressor.errors import InputError
from compressor.ir.layout import AttentionShape, ModelLayout


def attention_shape(layout: ModelLayout) -> AttentionShape:
    """The heads that all blocks have. Raises InputError where they differ."""
    shapes = {unit.attention for unit in layout.units if unit.kind == "block"}
    (shape,) = shapes if len(shapes) == 1 else (None,)
    if shape is None:
        raise InputError("blocks of this model differ in their heads: one policy cannot hold them")
    return shape


def block_policy(
    layout: ModelLayout,
    selection: BlockSelection,
    *,
    made_by: Mapping[str, Any],
    dense: Collection[int] = (),
) -> AttentionPolicy:
    """Every block chooses by `selection`, but for the `dense` ones. Raises InputError where a
    policy cannot describe the model."""
    shape = attention_shape(layout)
    blocks = sum(unit.kind == "block" for unit in layout.units)
    layers = tuple(
        LayerPolicy(blocks=None if index in dense else selection) for index in range(blocks)
    )
    policy = AttentionPolicy(
        heads=shape.heads, kv_heads=shape.kv_heads, layers=layers, made_by=dict(made_by)
    )
    check_policy(policy, layout)
    return policy


def sparse_config(selection: BlockSelection) -> dict[str, Any]:
    """`sparse_config` of InfLLM-V2's selector; its `topk` does not count local blocks."""
    return {
        "kernel_size": selection.kernel_size,
        "kernel_stride": selection.stride,
        "init_blocks": selection.init_blocks,
        "block_size": selection.block_size,
        "window_size": selection.local_blocks * selection.block_size,
        "topk": selection.top_k - selection.local_blocks,
        "dense_len": selection.dense_below,
        "use_nope": False,
    }


def share_read(selection: BlockSelection, length: int) -> float:
    """Share of the keys of a text of `length` tokens that its last query attends to."""
    count = rules(selection)[0].blocks(length)
    return min(1.0, selection.top_k / count)
