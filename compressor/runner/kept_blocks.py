"""A model with fewer blocks, as transformers makes it: its config.json, and whether each block is
still of the same kind."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.arch.kept_blocks import kept_config
from compressor.checkpoint.kept_blocks import kept_source
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.runner.block_runner import BlockRunner
from compressor.runner.model import resolved_config


def with_blocks(source: Source, kept: Sequence[int]) -> Source:
    """The source with these of its blocks alone, ascending. Raises InputError where they cannot
    stand at other places."""
    if source.arch.free:
        return kept_source(source, kept, {})  # which says why not
    config = source.checkpoint.config
    sparse = {
        unit.index
        for unit in source.layout.blocks
        if any(linear.expert is not None for linear in unit.linears)
    }
    dense = [unit.index for unit in source.layout.blocks if unit.index not in sparse]
    filled = {} if source.arch.runtime.twin else resolved_config(config)
    made = kept_config(source.arch, config, kept, filled=filled, dense=dense if sparse else ())
    return kept_source(source, kept, made)


def check_kinds(source: Source, shorter: Source, kept: Sequence[int]) -> None:
    """Raises InputError where transformers would run a kept block otherwise than before: with
    another window, another kind of attention, or keys of another block."""
    before, after = (_layers(one) for one in (source, shorter))
    for number, block in enumerate(kept):
        for (path, old), (_, new) in zip(
            before[block].named_modules(), after[number].named_modules(), strict=False
        ):
            ours, theirs = _said(new), _said(old)
            other = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            if type(old) is not type(new) or other:
                what = (
                    f"{path or 'block'}.{other[0]} {ours.get(other[0])!r}, not "
                    f"{theirs.get(other[0])!r}"
                    if other
                    else f"{path} another module"
                )
                raise InputError(
                    f"block {block} would run otherwise as block {number}: {what}",
                    hint="config.json of this family says so by the blocks' numbers: keep other "
                    "blocks (keep: [...])",
                )


def _layers(source: Source) -> list[nn.Module]:
    config, names = source.checkpoint.config, source.arch.runtime
    return BlockRunner(
        config, names, device=torch.device("cpu"), dtype=source.checkpoint.dtype
    ).layers


def _said(module: nn.Module) -> dict[str, Any]:
    """Plain values that a module was made with, less its number."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ("training", "layer_idx", "layer_id", "layer_index", "block_idx")
        and isinstance(value, (bool, int, float, str, type(None)))
    }
