"""LoRA weights as peft saves them, as what they add to a model's weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.checkpoint.reader import ADAPTER_NAME, load_json
from compressor.checkpoint.safetensors import read_header, read_tensor
from compressor.checkpoint.source import not_finite
from compressor.errors import InputError
from compressor.ir.layout import is_weight, weight_name

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


def lora_deltas(folder: Path) -> dict[str, Tensor]:
    """Name of a weight → what is added to it, float32 and laid out as the module keeps it.

    Raises InputError for anything else than plain LoRA on linears.
    """
    config = load_json(folder / ADAPTER_NAME, what="peft config")
    _require_plain(config)
    halves: dict[str, dict[str, Tensor]] = {}
    for name, entry in read_header(folder / WEIGHTS_NAME).items():
        module = name.removeprefix(PREFIX).rpartition(".")[0]
        path, _, half = module.rpartition(".lora_")
        if not is_weight(name) or half not in ("A", "B") or len(entry.spec.shape) != 2:
            raise InputError(f"{folder}: {name} is no LoRA weight of a linear", hint=_MERGE)
        halves.setdefault(path, {})[half] = read_tensor(entry).float()
    deltas = {}
    for path, pair in halves.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise InputError(f"{folder}: the LoRA of {path} is not whole")
        delta = _scale(config, path, pair["A"].shape[0]) * (pair["B"] @ pair["A"])
        deltas[weight_name(path)] = delta.T.contiguous() if config.get("fan_in_fan_out") else delta
    if bad := not_finite(deltas):
        raise InputError(f"{folder}: the LoRA of {bad[0]} holds NaN or infinity after tuning")
    return deltas


_MERGE = "merge it into the emulator (peft: merge_and_unload, save_pretrained) and name that folder"


def _require_plain(config: Mapping[str, Any]) -> None:
    beyond = [
        key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        beyond.append("bias")
    if config.get("peft_type", "LORA") != "LORA":
        beyond.append(str(config["peft_type"]))
    if beyond:
        raise InputError(f"{ADAPTER_NAME}: more than plain LoRA: {', '.join(beyond)}", hint=_MERGE)


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank; patterns name modules with an alpha of their own."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern")
    for pattern, own in (patterns if isinstance(patterns, dict) else {}).items():
        if path == pattern or path.endswith(f".{pattern}"):
            alpha = own
    if not isinstance(alpha, (int, float)):
        raise InputError(f"{ADAPTER_NAME}: lora_alpha is {alpha!r}, not a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
