"""Mistral's own files, consolidated*.safetensors beside params.json, seen as a Hugging Face
checkpoint: other names, a config made of params.json, and q and k whose rows lie as Mistral's RoPE
turns them, neighbours together, in place of halves.

Facts: mistral-inference's model arguments, and transformers' convert_mistral_weights_to_hf.py.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.low_precision.base import FLOATS, DecodedCheckpoint, Stored
from compressor.checkpoint.reader import Checkpoint, load_json, open_checkpoint
from compressor.checkpoint.safetensors import Entry, read_header
from compressor.errors import InputError, Problems

PARAMS, FILES = "params.json", "consolidated*.safetensors"

MODULES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
PARTS = {
    r"attention\.w([qkvo])": r"self_attn.\1_proj",
    r"attention_norm": "input_layernorm",
    r"ffn_norm": "post_attention_layernorm",
    r"feed_forward\.w1": "mlp.gate_proj",
    r"feed_forward\.w2": "mlp.down_proj",
    r"feed_forward\.w3": "mlp.up_proj",
    r"feed_forward\.gate": "block_sparse_moe.gate",
    r"feed_forward\.experts\.(\d+)\.(w[123])": r"block_sparse_moe.experts.\1.\2",
}
"""Path in a layer there → here."""

KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "sliding_window": "sliding_window",
}
NEEDED = ("dim", "n_layers", "hidden_dim", "n_heads", "vocab_size")
SILENT = ("max_batch_size", "model_type", "use_cache", "use_biases", "causal", "max_seq_len")
"""Keys that say nothing of the weights, or are looked at apart."""

OTHERS = {
    "vision_encoder": "a vision tower",
    "quantization": "weights that are quantized already",
    "lora": "an adapter",
    "q_lora_rank": "attention with latents",
    "yarn": "YaRN positions",
    "llama_4_scaling": "scaled queries",
}
"""Keys of models that Mistral publishes and that are read from their Hugging Face files alone."""


def open_any(folder: Path, *, to_plan: bool = False) -> Checkpoint:
    """A folder's checkpoint: `open_checkpoint`'s, or Mistral's own where there is no other."""
    there = (folder / PARAMS).is_file() and any(folder.glob(FILES))
    others = any(folder.glob("model*.safetensors*")) or (folder / "config.json").is_file()
    return (
        open_consolidated(folder)
        if there and not others
        else open_checkpoint(folder, to_plan=to_plan)
    )


def open_consolidated(folder: Path) -> Checkpoint:
    """Such a folder as a checkpoint under Hugging Face names. Raises InputError for a model of
    another kind, Problems with all tensors that have no place or two."""
    params = load_json(folder / PARAMS, what="parameters")
    entries: dict[str, Entry] = {}
    problems: list[Any] = []
    for file in sorted(folder.glob(FILES)):
        for name, entry in read_header(file).items():
            if name in entries:
                problems.append(
                    InputError(f"{name} is in {entries[name].file.name} and {file.name}")
                )
            entries[name] = entry
    config = _config(params, entries)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    renamed: dict[str, Entry] = {}
    stored: dict[str, Stored] = {}
    for name, entry in entries.items():
        ours = _renamed(name)
        if ours is None or entry.spec.dtype not in FLOATS:
            problems.append(InputError(f"{name} has no place in a {config['model_type']} model"))
            continue
        renamed[ours] = entry
        found = re.search(r"attention\.w([qk])\.weight$", name)
        if found is not None:
            size = (heads[found[1]], config["head_dim"])
            if entry.spec.shape[:1] != (size[0] * size[1],):
                problems.append(
                    InputError(f"{name} has {entry.spec.shape[0]} rows, {PARAMS} says {size}")
                )
            turned = partial(_turned, heads=size[0])
            stored[ours] = Stored({"weight": name}, entry.spec.shape, turned)
    if problems:
        raise Problems(problems)
    return DecodedCheckpoint(
        folder=folder,
        config=config,
        entries=renamed,
        notes=(f"Mistral's own files: {len(renamed)} tensors under their Hugging Face names",),
        stored=stored,
        files={part: entries[part] for x in stored.values() for part in x.parts.values()},
    )


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder a q or k weight [heads · head_dim, in], or bias, from rows of which RoPE turns the
    neighbours (2i, 2i+1) of a head together, as Mistral's files and llama.cpp have them, to a
    checkpoint's, of which it turns (i, i + head_dim/2)."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _turned(parts: Mapping[str, Tensor], *, heads: int) -> Tensor:
    return halves_from_pairs(parts["weight"].float(), heads)


def _renamed(name: str) -> str | None:
    path, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    if path in MODULES:
        return f"{MODULES[path]}.{leaf}"
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
    for theirs, ours in PARTS.items() if layer is not None else ():
        found = re.fullmatch(theirs, layer[2]) if layer is not None else None
        if found is not None and layer is not None:
            return f"model.layers.{layer[1]}.{found.expand(ours)}.{leaf}"
    return None


def _config(params: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """config.json as transformers would have it."""
    for key, what in OTHERS.items():
        if params.get(key):
            raise InputError(
                f"{PARAMS} has {key!r}: {what} is not read from Mistral's own files",
                hint="take the same model's Hugging Face files (config.json, model*.safetensors)",
            )
    known = {*KEYS, *SILENT, *OTHERS, "rope_theta", "max_position_embeddings", "moe"}
    if strange := sorted(key for key in params.keys() - known if params[key] is not None):
        raise InputError(
            f"{PARAMS} has {', '.join(map(repr, strange))}, of which is not known what it changes",
            hint="take the same model's Hugging Face files (config.json, model*.safetensors)",
        )
    if lacking := [key for key in NEEDED if type(params.get(key)) is not int or params[key] < 1]:
        raise InputError(f"{PARAMS} lacks {', '.join(lacking)}, or has no count there")
    if params.get("use_biases"):
        raise InputError(f"{PARAMS} has biases, which no Mistral model of transformers has")
    moe = params.get("moe")
    config: dict[str, Any] = {ours: params[key] for key, ours in KEYS.items() if key in params}
    config.setdefault("head_dim", params["dim"] // params["n_heads"])
    config.setdefault("num_key_value_heads", params["n_heads"])
    config.setdefault("sliding_window", None)
    config["tie_word_embeddings"] = bool(params.get("tied_embeddings", False))
    dtypes = [entry.spec.dtype for entry in entries.values()] or [torch.bfloat16]
    positions = params.get("max_position_embeddings") or params.get("max_seq_len") or 32768
    config |= {
        "model_type": "mistral" if moe is None else "mixtral",
        "architectures": ["MistralForCausalLM" if moe is None else "MixtralForCausalLM"],
        "max_position_embeddings": positions,
        "rope_theta": float(params.get("rope_theta") or 10000.0),
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": str(max(set(dtypes), key=dtypes.count)).removeprefix("torch."),
    }
    if moe is not None:
        if not isinstance(moe, Mapping) or set(moe) != {"num_experts", "num_experts_per_tok"}:
            raise InputError(f"{PARAMS}: moe is {moe!r}, not num_experts and num_experts_per_tok")
        config["num_local_experts"] = moe["num_experts"]
        config["num_experts_per_tok"] = moe["num_experts_per_tok"]
    return config
