"""config.json of a model that has some of another's blocks, renumbered.

What config.json says of single blocks goes with them, in each of the forms that families have for
it: a list with an item for each block, a string with a letter for each, numbers of blocks, how many
of the first are otherwise, and objects by number.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.arch.schema import MapFile
from compressor.arch.sizes import read_sizes
from compressor.errors import InputError

NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices")
"""Keys whose value lists numbers of blocks."""

FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Keys that say how many of the first blocks are otherwise than those after them."""

BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers")
"""Keys by which a block computes otherwise at another place, or needs another block."""

OF_MODEL = re.compile(r".*token_ids?|architectures|.*_name_or_path|id2label|label2id|.*_sections?")
"""Keys whose lists are never of blocks."""


def kept_config(
    arch: MapFile,
    config: Mapping[str, Any],
    kept: Sequence[int],
    *,
    filled: Mapping[str, Any],
    dense: Sequence[int] = (),
) -> dict[str, Any]:
    """config.json of a model whose block i is block kept[i] (ascending) of this one's.

    filled  the same config with the defaults of its family, which may say of each block what
            config.json leaves to a rule
    dense   those of this model's blocks that have no experts, in a model that has some
    Raises InputError where a block at another place is another one.
    """
    for key in BY_NUMBER:
        if arch.value(config, key):
            raise InputError(
                f"config.json: {key}: a block of this model depends on its number, so blocks "
                "cannot be left out"
            )
    nested = arch.config is not None and isinstance(config.get(arch.config), dict)
    inner: Mapping[str, Any] = config[str(arch.config)] if nested else config
    whole = filled.get(str(arch.config)) if nested else filled
    said = {key: value for key, value in inner.items() if value is not None}
    ours = _kept_section(
        {**(whole if isinstance(whole, dict) else {}), **said},
        kept,
        count=read_sizes(arch, config).size("layers"),
        sizes=arch.sizes["layers"],
    )
    made = {**inner, **ours}
    if int(inner.get("decoder_sparse_step") or 1) > 1:
        made |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, block in enumerate(kept) if block in dense],
        }
    return {**config, str(arch.config): made} if nested else made


def _kept_section(
    section: Mapping[str, Any], kept: Sequence[int], *, count: int, sizes: str | tuple[str, ...]
) -> dict[str, Any]:
    """What changes in the part of config.json that describes the blocks."""
    place = {block: number for number, block in enumerate(kept)}
    counts = (sizes,) if isinstance(sizes, str) else sizes
    made: dict[str, Any] = {}
    for key, value in section.items():
        if key in NUMBERS and isinstance(value, list):
            made[key] = [place[block] for block in value if block in place]
        elif key in FIRST and isinstance(value, int):
            made[key] = sum(block < value for block in kept)
        elif key == "moe_layer_end_index" and isinstance(value, int) and value >= 0:
            made[key] = sum(block <= value for block in kept) - 1
        elif key == "per_layer_config" and isinstance(value, dict):
            made[key] = {
                str(place[int(block)]): own for block, own in value.items() if int(block) in place
            }
        elif key in counts and isinstance(value, int):
            made[key] = len(kept)
        elif isinstance(value, str) and key in counts and len(value) == count:
            made[key] = "".join(value[block] for block in kept)
        elif isinstance(value, list) and len(value) == count and not OF_MODEL.fullmatch(key):
            made[key] = [value[block] for block in kept]
    return made
