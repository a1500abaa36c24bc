"""A second reader of quantized weights, for verification: numpy only, written from the formats'
descriptions, sharing no code with the writers.

Each format's is `second_reader.py` in its folder: READS says which values of a
`quantization_config` are its own, `decode(config, module, tensors)` gives a weight, or None where
it is stored as floats. Arrays are as the file holds them. numpy has no bfloat16 and no float8, so
bfloat16 arrives as uint16 bit patterns and float8 E4M3 as uint8. Every complaint is a ValueError
that names the tensor.
"""

import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from compressor.formats.second_reader.arrays import Arrays, Config, numbers
from compressor.formats.second_reader.grids import FLOAT_DTYPES, Decoded, DecodedWeight


def decode_linear(quantization_config: Config | None, module: str, tensors: Arrays) -> Decoded:
    """The weight of linear `module` from its local tensors ("weight_packed", "qweight" …).

    quantization_config  the entry of config.json, empty or None for a float checkpoint
    """
    config = quantization_config or {}
    if config:
        folders = tuple(importlib.import_module("compressor.formats").__path__)
        reader = next((x for x in _readers(folders) if _has(config, x.READS)), None)
        if reader is None:
            keys = ("quant_method", "quant_algo", "checkpoint_format")
            said = {key: config[key] for key in keys if key in config}
            raise ValueError(f"quantization_config {said} is not known")
        found: Decoded | None = reader.decode(config, module, tensors)
        if found is not None:
            return found
    return DecodedWeight(numbers(tensors, "weight", shape=None, dtypes=FLOAT_DTYPES))


def _has(config: Config, values: Mapping[str, Sequence[Any]]) -> bool:
    return all(config.get(key) in known for key, known in values.items())


@cache
def _readers(folders: tuple[str, ...]) -> tuple[ModuleType, ...]:
    """Looked for once: each layer is decoded in a thread that would keep others from running."""
    names = sorted(p.parent.name for f in folders for p in Path(f).glob("*/second_reader.py"))
    return tuple(importlib.import_module(f"compressor.formats.{n}.second_reader") for n in names)
