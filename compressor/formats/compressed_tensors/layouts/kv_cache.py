"""compressed-tensors `kv_cache_scheme`: static scales for keys and values.

The tensors are `self_attn.k_scale` and `self_attn.v_scale`, [1] or [kv_heads, 1, 1], multipliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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


def kv_tensors(
    kv: KVSpec, attention: str, *, k_scale: Tensor, v_scale: Tensor, model_dtype: torch.dtype
) -> dict[str, Tensor]:
    """One layer's scales in the model's dtype. Raises InputError for what `kv_entry` refuses."""
    kv_entry(kv)
    shape = (1,) if kv.per == "tensor" else (-1, 1, 1)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return {
        f"{attention}.{name}": scale.reshape(shape).to(model_dtype)
        for name, scale in scales.items()
    }


def kv_scales(tensors: Mapping[str, Tensor], attention: str) -> tuple[Tensor, Tensor] | None:
    """One layer's scales of keys and values in float32, or None where there are none."""
    names = (f"{attention}.k_scale", f"{attention}.v_scale")
    if not any(name in tensors for name in names):
        return None
    for name in names:
        if name not in tensors:
            raise InputError(f"tensor {name!r} is missing")
    k_scale, v_scale = (tensors[name].to(torch.float32).reshape(-1) for name in names)
    return k_scale, v_scale
