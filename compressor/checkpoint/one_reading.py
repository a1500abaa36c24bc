"""Where a checkpoint says two things, the one that transformers and vLLM both read, or a refusal.

A quantization config over plain weights, a head stored under a tied flag, biases that the config
does not know of.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from compressor.arch.schema import MapFile
from compressor.checkpoint.low_precision.base import FLOATS
from compressor.checkpoint.reader import Checkpoint, load_json
from compressor.checkpoint.safetensors import Entry, read_tensor
from compressor.errors import InputError, several
from compressor.ir.layout import ModelLayout, weight_name
from compressor.ir.tensor import TensorShape

CHUNK = 64 << 20


def _awq(file: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        "quant_method": "awq",
        "bits": file.get("w_bit", file.get("bits")),
        "group_size": file.get("q_group_size", file.get("group_size")),
        "zero_point": file.get("zero_point", True),
        "version": str(file.get("version", "gemm")).lower(),
    }
    skipped = file.get("modules_to_not_convert")
    return {**found, "modules_to_not_convert": skipped} if skipped else found


def _modelopt(file: Mapping[str, Any]) -> dict[str, Any]:
    inner = file.get("quantization")
    known = dict(inner) if isinstance(inner, dict) else dict(file)
    ignored = known.pop("exclude_modules", None)
    kv = known.pop("kv_cache_quant_algo", None)
    return {
        "quant_method": "modelopt",
        **known,
        "ignore": ignored or [],
        **({"kv_cache_scheme": kv} if kv else {}),
    }


BESIDE: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "quantize_config.json": lambda x: _awq(x) if "w_bit" in x else {"quant_method": "gptq", **x},
    "quant_config.json": _awq,
    "hf_quant_config.json": _modelopt,
}
"""Files in which tools declared a quantization before config.json did → as config.json says it."""


def settle_quantization(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a `quantization_config` exactly if it holds quantized tensors.

    Codes without a declaration are left to who reads them; a declaration over plain weights, as
    saving a merged model leaves it, goes.
    """
    config = dict(checkpoint.config)
    declared = config.get("quantization_config")
    coded = any(entry.spec.dtype not in FLOATS for entry in checkpoint.entries.values())
    if coded and not isinstance(declared, dict):
        for name, entry in BESIDE.items():
            file = checkpoint.folder / name
            if file.is_file():
                config["quantization_config"] = entry(load_json(file, what="quantization config"))
                note = f"quantized as {name} says: config.json declares nothing"
                return replace(checkpoint, config=config, notes=(*checkpoint.notes, note))
        codes = [n for n in checkpoint.entries if n.endswith((".qweight", ".weight_packed"))]
        if codes:
            raise InputError(
                f"{codes[0]} holds codes, but neither config.json nor {', '.join(BESIDE)} says how "
                "they are to be read",
                hint="bring the file that declares the quantization here, or start from the "
                "original weights",
            )
    if coded or declared is None or _has_cache(checkpoint, declared):
        return checkpoint
    del config["quantization_config"]
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    note = (
        f"config.json declares a quantization ({method}), but all tensors are plain floats: they "
        "are read as they are, and the declaration goes"
    )
    return replace(checkpoint, config=config, notes=(*checkpoint.notes, note))


def _has_cache(checkpoint: Checkpoint, declared: Any) -> bool:
    """Whether a declaration is about the KV cache, which quantizes no tensor."""
    stated = isinstance(declared, dict) and declared.get("kv_cache_scheme") is not None
    return stated or any(name.endswith((".k_scale", ".v_scale")) for name in checkpoint.entries)


def is_tied(config: Mapping[str, Any], arch: MapFile) -> bool:
    """Whether the config ties the head to the embedding."""
    stated = config.get("tie_word_embeddings")
    return (arch.defaults.get("tie_word_embeddings") if stated is None else stated) is True


def settle_head(checkpoint: Checkpoint, arch: MapFile) -> Checkpoint:
    """The checkpoint without a stored head where the config ties it and both hold the same.

    Raises InputError where they differ: transformers takes the stored head then, vLLM and
    llama.cpp the embedding.
    """
    head, token = weight_name(arch.head.linear), weight_name(arch.embedding.token)
    stored = [name for name in checkpoint.entries if name.startswith(f"{arch.head.linear}.")]
    if not is_tied(checkpoint.config, arch) or not stored:
        return checkpoint
    entries = dict(checkpoint.entries)
    way_out = "to keep the stored head, set tie_word_embeddings to false in config.json; else "
    if token not in entries and head in entries:
        entries[token] = entries.pop(head)
        note = f"{token} is not stored: the tied {head} is read for it"
        return replace(checkpoint, entries=entries, notes=(*checkpoint.notes, note))
    same = _same(checkpoint, head, token) if head in entries and token in entries else False
    if same is None:
        return checkpoint
    if not same:
        raise InputError(
            f"config.json ties the head to {token}, but another {stored[0]} is stored: "
            "transformers takes the stored one, vLLM the embedding",
            hint=way_out + f"remove {', '.join(stored)}",
        )
    del entries[head]
    note = f"{head} is the tied {token} once more and is not written twice"
    return replace(checkpoint, entries=entries, notes=(*checkpoint.notes, note))


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool | None:
    """Whether two tensors hold the same values; None where they are not on this machine."""
    a, b = checkpoint.entry(one), checkpoint.entry(other)
    if type(checkpoint) is not Checkpoint or a.spec != b.spec:
        if a.spec.shape != b.spec.shape:
            return False
        read = checkpoint.read([one, other])
        return torch.equal(read[one].to(read[other].dtype), read[other])
    if not a.file.is_file() or not b.file.is_file():
        return None
    return all(
        torch.equal(read_tensor(_bytes(a, at)), read_tensor(_bytes(b, at)))
        for at in range(0, a.spec.nbytes, CHUNK)
    )


def _bytes(entry: Entry, at: int) -> Entry:
    """A part of a tensor, as bytes."""
    begin = entry.begin + at
    end = min(begin + CHUNK, entry.end)
    return Entry(entry.file, TensorShape(torch.uint8, (end - begin,)), begin, end)


def without_unread(checkpoint: Checkpoint, layout: ModelLayout) -> Checkpoint:
    """The checkpoint without tensors that no loader reads, as a note says."""
    if not layout.unread:
        return checkpoint
    kept = {n: e for n, e in checkpoint.entries.items() if n not in set(layout.unread)}
    note = f"left out, as loaders do: {several(layout.unread)}"
    return replace(checkpoint, entries=kept, notes=(*checkpoint.notes, note))


def settle_biases(checkpoint: Checkpoint, layout: ModelLayout) -> Checkpoint:
    """The checkpoint without biases that the config does not announce, which have to be zero.

    Loaders build the model from the config and skip them; some quantizers store zeros for every
    linear. Raises InputError for one that is not zero.
    """
    names = layout.unannounced
    if not names:
        return checkpoint
    kept = {name: e for name, e in checkpoint.entries.items() if name not in set(names)}
    local = type(checkpoint) is not Checkpoint or checkpoint.entry(names[0]).file.is_file()
    for name, bias in checkpoint.read(names).items() if local else ():
        if bool((bias != 0).any()):
            raise InputError(
                f"{name} is stored and not zero, but a {layout.model_type} with this config.json "
                "has no such bias: transformers and vLLM would leave it out",
                hint="if the model was trained with it, config.json has to say so "
                "(attention_bias: true, mlp_bias: true); else remove it",
            )
    more = f" and {len(names) - 1} more biases" if len(names) > 1 else ""
    note = f"left out, as loaders do: {names[0]}{more}, all zero"
    return replace(checkpoint, entries=kept, notes=(*checkpoint.notes, note))
