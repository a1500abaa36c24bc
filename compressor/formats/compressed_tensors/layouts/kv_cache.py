"""compressed-tensors `kv_cache_scheme`: static scales for keys and values.

The tensors are `self_attn.k_scale` and `self_attn.v_scale`, [1] or [kv_heads, 1, 1], multipliers.
"""

from collections.abc import Mapping
from typing import Any

from compressor.errors import InputError
from compressor.formats.compressed_tensors.layouts.base import arguments
from compressor.ir.scheme import KVSpec

TYPES = {"fp8_e4m3": "float", "int8": "int"}
STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
STATIC = (
    KVSpec("fp8_e4m3", "tensor"),
    KVSpec("fp8_e4m3", "head"),
    KVSpec("int8", "tensor"),
    KVSpec("int8", "head"),
)


def kv_entry(kv: KVSpec) -> dict[str, Any]:
    """The `kv_cache_scheme` entry. Raises InputError for what no loader of this format reads."""
    if kv not in STATIC:
        raise InputError(
            f"compressed-tensors has no form for a {kv.element} KV cache with a scale per {kv.per}",
            hint="fp8_e4m3 or int8, per tensor or head",
        )
    return arguments(bits=8, type=TYPES[kv.element], symmetric=True, strategy=STRATEGIES[kv.per])


def read_kv(entry: Mapping[str, Any]) -> KVSpec:
    """The spec of a `kv_cache_scheme` entry. Raises InputError for what is not supported."""
    keys = ("num_bits", "type", "symmetric", "strategy", "dynamic")
    for kv in STATIC:
        known = kv_entry(kv)
        if all(entry.get(key) == known[key] for key in keys):
            return kv
    raise InputError(f"kv_cache_scheme {dict(entry)} is not supported")
