"""A GGUF file as a source: rewritten once as a Hugging Face checkpoint, tensor by tensor.

What is written holds the dequantized weights, under the names and in the row order of a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.checkpoint import INDEX_NAME
from compressor.durable import move, write_atomically
from compressor.errors import InputError
from compressor.gguf_file import GgufFile, open_gguf
from compressor.gguf_tokenizer import tokenizer_files
from compressor.ir.tensor import TensorShape
from compressor.safetensors_file import tensor_bytes
from compressor.shards import plan_shards

MAX_SHARD_BYTES = 5 * 10**9

# GGUF name of a block's tensor → checkpoint name.
LLAMA_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
QKV_BIAS = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
QK_NORM = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
ROPE_FACTORS = "rope_freqs.weight"
SPECIAL_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


@dataclass(frozen=True, slots=True)
class _Family:
    """How one architecture of GGUF is written as a checkpoint.

    block     names within a block
    permuted  q and k rows lie in the order of interleaved rotary pairs, not of halves
    config    keys of config.json that the file does not state
    """

    model_class: str
    block: Mapping[str, str]
    permuted: bool
    config: Mapping[str, Any]


FAMILIES = {
    "llama": _Family(
        model_class="LlamaForCausalLM",
        block=LLAMA_BLOCK,
        permuted=True,
        config={"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": _Family(
        model_class="Qwen2ForCausalLM",
        block=LLAMA_BLOCK | QKV_BIAS,
        permuted=False,
        config={"use_sliding_window": False},
    ),
    "qwen3": _Family(
        model_class="Qwen3ForCausalLM",
        block=LLAMA_BLOCK | QK_NORM,
        permuted=False,
        config={"attention_bias": False, "use_sliding_window": False},
    ),
}


def convert_gguf(path: Path, output_dir: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the model of a GGUF file as a checkpoint folder and return the folder.

    It gets safetensors with an index, config.json, generation_config.json, tokenizer.json and
    tokenizer_config.json. At most one tensor is in memory, and the folder appears only when it is
    whole. Raises InputError for a file that is damaged or of an architecture other than llama,
    qwen2 or qwen3, for an output folder that exists, and where the package `gguf` is missing.
    """
    if output_dir.exists():
        raise InputError(f"{output_dir} is there already", hint="name a new folder")
    file = open_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    family = FAMILIES.get(architecture)
    if family is None:
        raise InputError(
            f"{path.name} holds a model of architecture {architecture!r}",
            hint=f"a GGUF source may be {', '.join(FAMILIES)}; for another, use its Hugging Face "
            "checkpoint",
        )
    config = _config(file, architecture, family) | {"dtype": str(dtype).removeprefix("torch.")}
    names = _names(file, family, blocks=config["num_hidden_layers"])
    _check_shapes(file, config)
    generation = {key: value for key, value in config.items() if key in SPECIAL_IDS}
    files = {
        "config.json": _json(config),
        "generation_config.json": _json(generation),
        **tokenizer_files(file.metadata, max_length=config["max_position_embeddings"]),
    }
    work = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        heads = (config["num_attention_heads"], config["num_key_value_heads"])
        _write_weights(file, work, names, heads=heads if family.permuted else None, dtype=dtype)
        for name, data in files.items():
            write_atomically(work / name, data)
        move(work, output_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return output_dir


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _config(file: GgufFile, architecture: str, family: _Family) -> dict[str, Any]:
    """config.json of the model, without its dtype."""

    def stated(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(
                f"{file.path.name} says {architecture}.{key} is {value!r}; one positive number is "
                "needed"
            )
        # Numbers are stored as fp32: 9.99999974e-06 is meant to be 1e-05.
        return value if isinstance(value, int) else float(str(np.float32(value)))

    if file.metadata.get(f"{architecture}.expert_count"):
        raise InputError(
            f"{file.path.name} holds a mixture of experts, which is not converted",
            hint="use its Hugging Face checkpoint",
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path.name} has no token_embd.weight")
    heads, hidden = stated("attention.head_count"), stated("embedding_length")
    head_dim = stated("attention.key_length", hidden // heads)
    if stated("rope.dimension_count", head_dim) != head_dim:
        raise InputError(
            f"{file.path.name} rotates only a part of each head",
            hint="use its Hugging Face checkpoint",
        )
    theta = stated("rope.freq_base", 10000.0)
    scaling = _rope_scaling(file, architecture, theta=theta, head_dim=head_dim)
    config = {
        "architectures": [family.model_class],
        "model_type": architecture,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": stated("feed_forward_length"),
        "num_hidden_layers": stated("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": stated("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": stated("context_length"),
        "rms_norm_eps": stated("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling},
        # For readers older than rope_parameters, which would fall back on a base of their own.
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **family.config,
    }
    if scaling:
        config["rope_scaling"] = scaling
    special = {name: key for name, key in SPECIAL_IDS.items() if key in file.metadata}
    return config | {name: file.metadata[key] for name, key in special.items()}


def _rope_scaling(
    file: GgufFile, architecture: str, *, theta: float, head_dim: int
) -> dict[str, Any]:
    """What config.json says about stretched rotary frequencies; empty where they are not.

    llama.cpp stores Llama 3's stretching as finished divisors of the frequencies. Its parameters
    are recovered only where they are those of the published models and give the same divisors.
    """
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        factor = file.metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
        return {"rope_type": "linear", "factor": float(factor)}
    if ROPE_FACTORS not in file.tensors:
        if kind == "none":
            return {}
        raise InputError(
            f"{file.path.name} stretches its rotary frequencies by {kind!r}",
            hint="use its Hugging Face checkpoint",
        )
    divisors = file.read(ROPE_FACTORS).double()
    factor = round(float(divisors.max()), 3)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    turns = 8192 * theta ** (-pairs / head_dim) / (2 * math.pi)
    smooth = ((turns - 1) / (4 - 1)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise InputError(
            f"{file.path.name} stretches its rotary frequencies in a way that is not Llama 3's",
            hint="use its Hugging Face checkpoint",
        )
    return scaling


def _names(file: GgufFile, family: _Family, *, blocks: int) -> dict[str, str]:
    """Checkpoint name → GGUF name, in the order of the model; each tensor of the file once."""
    names = {"model.embed_tokens.weight": "token_embd.weight"}
    for i in range(blocks):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{t}" for t, ours in family.block.items()}
    names["model.norm.weight"] = "output_norm.weight"
    if "output.weight" in file.tensors:
        names["lm_head.weight"] = "output.weight"
    missing = [theirs for theirs in names.values() if theirs not in file.tensors]
    unknown = sorted(file.tensors.keys() - set(names.values()) - {ROPE_FACTORS})
    for found, what in ((missing, "lacks"), (unknown, "has tensors this model does not have:")):
        if found:
            shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            raise InputError(f"{file.path.name} {what} {shown}")
    return names


def _check_shapes(file: GgufFile, config: Mapping[str, Any]) -> None:
    """Refuse a file whose first block is not what its metadata says."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    rows = {
        "attn_q": config["num_attention_heads"] * head_dim,
        "attn_k": config["num_key_value_heads"] * head_dim,
        "ffn_up": config["intermediate_size"],
    }
    for name, count in rows.items():
        shape = file.tensors[f"blk.0.{name}.weight"].shape
        if shape != (count, hidden):
            raise InputError(
                f"{file.path.name} says that blk.0.{name} is {[count, hidden]}, but it is "
                f"{list(shape)}"
            )


def _write_weights(
    file: GgufFile,
    folder: Path,
    names: Mapping[str, str],
    *,
    heads: tuple[int, int] | None,
    dtype: torch.dtype,
) -> None:
    """Shards and their index. `heads`, query and key heads, where q and k are permuted."""
    specs = {n: TensorShape(dtype=dtype, shape=file.tensors[t].shape) for n, t in names.items()}
    largest = max(spec.nbytes for spec in specs.values())
    layout = plan_shards(
        [{name: spec} for name, spec in specs.items()], max_bytes=max(MAX_SHARD_BYTES, largest)
    )
    for shard in layout.shards:
        with (folder / shard.file).open("wb") as out:
            out.write(shard.header)
            for name in shard.tensors:
                value = file.read(names[name])
                if heads and name.endswith(("q_proj.weight", "k_proj.weight")):
                    value = halves_from_pairs(value, heads[name.endswith("k_proj.weight")])
                out.write(tensor_bytes(value.to(dtype)))
            out.flush()
            os.fsync(out.fileno())
    write_atomically(folder / INDEX_NAME, layout.index())


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder a q or k weight [heads · head_dim, in] from llama.cpp's rows to a checkpoint's.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head together, a checkpoint rows
    (i, i + head_dim/2).
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)
