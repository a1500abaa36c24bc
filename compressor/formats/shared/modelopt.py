"""What ModelOpt's formats share: one way of quantizing for the whole checkpoint, scalar float32
scales that are multipliers, and a config that stands in two files."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.formats.base import Format, Headers, ModelSchemes
from compressor.formats.shared.whole_checkpoint import common_scheme
from compressor.ir.scheme import KVSpec, Scheme
from compressor.ir.tensor import TensorShape

KV = KVSpec("fp8_e4m3", "tensor")
KV_ENTRY = {"dynamic": False, "num_bits": 8, "type": "float"}
SCALAR = TensorShape(torch.float32, ())


class ModelOpt(Format):
    """What each of its formats answers alike."""

    kv_names = ("k_proj.k_scale", "v_proj.v_scale")

    def common_scheme(self, schemes: ModelSchemes) -> Scheme | None:
        """The one scheme of all quantized linears, or None where none is. Raises InputError."""
        hint = "use the compressed-tensors format"
        return common_scheme(schemes, name=self.name, kv=KV, hint=hint)

    def kv_tensor(self, kv: KVSpec, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """A float32 scalar beside the projection that it belongs to."""
        if kv != KV:
            raise InputError("ModelOpt has no form for a KV cache other than fp8_e4m3 per tensor")
        return scale.to(torch.float32).reshape(())


def config_entry(schemes: ModelSchemes, algorithm: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json; linears left alone are ignored by exact name."""
    entry: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "config_groups": {"group_0": {**group, "targets": ["Linear"]}},
        "ignore": schemes.plain,
        "producer": _producer(),
    }
    if schemes.kv is not None:
        entry["kv_cache_scheme"] = dict(KV_ENTRY)
    return entry


def config_file(schemes: ModelSchemes, algorithm: str, **details: Any) -> dict[str, Any]:
    """hf_quant_config.json, which readers of earlier versions look at."""
    return {
        "hf_quant_config.json": {
            "producer": _producer(),
            "quantization": {
                "quant_algo": algorithm,
                "kv_cache_quant_algo": None if schemes.kv is None else "FP8",
                **details,
                "exclude_modules": schemes.plain,
            },
        }
    }


def read_schemes(
    config: Mapping[str, Any],
    linears: Mapping[str, Headers],
    *,
    scheme: Scheme,
    stored: torch.dtype,
) -> ModelSchemes:
    """The scheme for every linear whose `weight` is stored in that dtype.

    Raises InputError where the config ignores a quantized linear, or quantizes a float one.
    """
    ignore = config.get("ignore") or []
    found = {}
    for module, tensors in linears.items():
        coded = "weight" in tensors and tensors["weight"].dtype == stored
        ignored = any(fnmatchcase(module, pattern) for pattern in ignore)
        if coded and ignored:
            raise InputError(f"{module} holds quantized tensors, but the config ignores it")
        if not coded and not ignored and tensors:
            raise InputError(f"{module} should be {config['quant_algo']}, but its weight is not")
        found[module] = scheme if coded else Scheme()
    kv = config.get("kv_cache_scheme")
    if kv not in (None, KV_ENTRY, "FP8"):
        raise InputError(f"quantization_config.kv_cache_scheme {kv!r} is not supported")
    return ModelSchemes(linears=found, kv=None if kv is None else KV)


def _producer() -> dict[str, str]:
    """ModelOpt's own, with the version whose form this is: readers know the format by its name."""
    return {"name": "modelopt", "version": "0.47.0"}
