"""The quantized cache of a checkpoint in a running model: keys and values are rounded by the scales
that lie in its files, whether or not the loader of its weights does so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from compressor.checkpoint.source import is_cache_scale, open_source
from compressor.errors import InputError
from compressor.ir.scheme import KVSpec
from compressor.numerics.activations import fake_quantize_kv

CODES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class LayerRounding:
    """How one layer's keys and values are cached, with the stored multipliers, None for what is
    scaled as the model runs."""

    spec: KVSpec
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, length, head_dim] as the cache gives them back; rounding
        again what static scales have rounded changes nothing."""
        return (
            fake_quantize_kv(keys, self.spec, self.key_scale),
            fake_quantize_kv(values, self.spec, self.value_scale),
        )

    def codes_layer(self) -> CodesLayer:
        """An empty layer of a cache that holds codes. Raises InputError where scales are not
        stored."""
        if self.key_scale is None or self.value_scale is None:
            raise InputError(f"a {self.spec.element} cache without stored scales is not held here")
        return CodesLayer(self, (self.key_scale, self.value_scale))


def loaded_from(model: Any) -> Path | None:
    """Where the files lie that a model was loaded from: a folder, or the Hub's cache. None where
    they are not here, or it was loaded from none."""
    from huggingface_hub import snapshot_download

    name = model.name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    revision = getattr(model.config, "_commit_hash", None)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def stored_cache(model: Any) -> list[LayerRounding] | None:
    """By layer, how the files that a model was loaded from say that its cache is rounded; None
    where they say nothing."""
    folder = loaded_from(model)
    if getattr(model.config, "quantization_config", None) is None or folder is None:
        return None
    source = open_source(folder)
    if source.schemes.kv is None:
        return None
    found = []
    for unit in source.layout.blocks:
        names = [name for name in source.added.get(unit.name, ()) if is_cache_scale(name)]
        scales = {
            name.rpartition(".")[2]: scale.float().to(model.device)
            for name, scale in (source.checkpoint.read(names) if names else {}).items()
        }
        found.append(LayerRounding(source.schemes.kv, scales.get("k_scale"), scales.get("v_scale")))
    return found


class CodesLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of transformers' growing cache that holds codes, a byte for each number."""

    def __init__(self, rounding: LayerRounding, scales: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.rounding = rounding
        self.scales = [scale.reshape(1, -1, 1, 1) for scale in scales]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in keys and values [rows, kv_heads, length, head_dim]; gives all that are held, in
        their dtype."""
        self.scales = [scale.to(key_states.device) for scale in self.scales]
        element, dtype = self.rounding.spec.element, key_states.dtype
        codes = []
        for x, scale in zip(
            self.rounding(key_states.float(), value_states.float()), self.scales, strict=True
        ):
            units = x / scale
            codes.append((units.round() if element == "int8" else units).to(CODES[element]))
        held = super().update(*codes)
        keys, values = (
            (x.float() * scale).to(dtype) for x, scale in zip(held, self.scales, strict=True)
        )
        return keys, values
