"""A GGUF file as a source: rewritten once as a Hugging Face checkpoint, tensor by tensor.

What is written holds the dequantized weights, under the names and in the row order of a checkpoint.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.consolidated import halves_from_pairs
from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.durable import move, write_atomically
from compressor.checkpoint.gguf.config import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    generation_config,
    model_config,
    unconverted,
)
from compressor.checkpoint.gguf.file import GgufFile, open_gguf
from compressor.checkpoint.gguf.tokenizer import UnknownTokenizer, tokenizer_files
from compressor.checkpoint.reader import NO_TOKENIZER
from compressor.checkpoint.safetensors import tensor_bytes
from compressor.errors import InputError, several
from compressor.foreign.calls import foreign
from compressor.ir.tensor import TensorShape, dtype_of_most

MAX_SHARD_BYTES = 5 * 10**9

# GGUF name of a block's tensor → checkpoint name.
ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
LLAMA_BLOCK = ATTENTION | {
    f"ffn_{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")
}
QKV_BIAS = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
QK_NORM = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
ATTENTION_BIAS = {
    **QKV_BIAS,
    "attn_output.bias": "self_attn.o_proj.bias",
}
MLP_BIAS = {f"ffn_{x}.bias": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONVERSION = "conversion.json"
"""What the folder of a converted model says of its making: {"notes": [...]}."""


@dataclass(frozen=True, slots=True)
class _Family:
    """How one architecture of GGUF is written as a checkpoint.

    block     names within a block
    permuted  q and k rows lie in the order of interleaved rotary pairs, not of halves
    config    keys of config.json that the file does not state
    biases    key of config.json → biases that all blocks have where it is true
    experts   names within a block of what is stacked over experts, {e} for the expert's number
    sizes     key of config.json → the file's, for what a mixture states beside
    """

    model_class: str
    block: Mapping[str, str]
    permuted: bool
    config: Mapping[str, Any]
    biases: Mapping[str, Mapping[str, str]]
    experts: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)


Place = tuple[str, int | None]
"""A tensor of the file, or the part of it that is an expert's."""
MIXTRAL = "mixtral"
FAMILIES = {
    "llama": _Family(
        model_class="LlamaForCausalLM",
        block=LLAMA_BLOCK,
        permuted=True,
        config={},
        biases={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
    ),
    "qwen2": _Family(
        model_class="Qwen2ForCausalLM",
        block=LLAMA_BLOCK | QKV_BIAS,
        permuted=False,
        config={"use_sliding_window": False},
        biases={},
    ),
    "qwen3": _Family(
        model_class="Qwen3ForCausalLM",
        block=LLAMA_BLOCK | QK_NORM,
        permuted=False,
        config={"use_sliding_window": False},
        biases={"attention_bias": ATTENTION_BIAS},
    ),
    # llama.cpp calls Mixtral a llama with experts.
    MIXTRAL: _Family(
        model_class="MixtralForCausalLM",
        block=ATTENTION | {"ffn_gate_inp.weight": "block_sparse_moe.gate.weight"},
        permuted=True,
        config={"model_type": "mixtral", "sliding_window": None},
        biases={},
        experts={
            "ffn_gate_exps.weight": "block_sparse_moe.experts.{e}.w1.weight",
            "ffn_up_exps.weight": "block_sparse_moe.experts.{e}.w3.weight",
            "ffn_down_exps.weight": "block_sparse_moe.experts.{e}.w2.weight",
        },
        sizes={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    ),
    "qwen3moe": _Family(
        model_class="Qwen3MoeForCausalLM",
        block=ATTENTION | QK_NORM | {"ffn_gate_inp.weight": "mlp.gate.weight"},
        permuted=False,
        config={
            "model_type": "qwen3_moe",
            "use_sliding_window": False,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        biases={"attention_bias": ATTENTION_BIAS},
        experts={
            f"ffn_{x}_exps.weight": f"mlp.experts.{{e}}.{x}_proj.weight"
            for x in ("gate", "up", "down")
        },
        sizes={
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
    ),
}


def convert_gguf(path: Path, output_dir: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the model of a GGUF file as a checkpoint folder and return the folder.

    It gets safetensors with an index, config.json, generation_config.json, conversion.json and,
    where the file's way of splitting text is known, tokenizer.json and tokenizer_config.json. At
    most one tensor is in memory, and the folder appears only when it is whole.

    dtype  of all weights of a quantized file; None: bfloat16. Files of floats keep their own
    Raises InputError for a file that is damaged or of an architecture that is not known here, for
    an output folder that exists, and where the package `gguf` is missing.
    """
    if output_dir.exists():
        raise InputError(f"{output_dir} is there already", hint="name a new folder")
    file = open_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    mixture = bool(file.metadata.get(f"{architecture}.expert_count"))
    family = FAMILIES.get(MIXTRAL if architecture == "llama" and mixture else architecture)
    if family is None or (architecture == MIXTRAL) or mixture != bool(family.experts):
        what = " with experts" if mixture else ""
        raise InputError(
            f"{path.name} holds a model of architecture {architecture!r}{what}",
            hint=f"a GGUF source may be {', '.join(FAMILIES)}; for another, use its Hugging Face "
            "checkpoint",
        )
    with foreign(f"{path.name} is not what its metadata says"):
        biases = {
            key: any(name.split(".", 2)[-1] in group for name in file.tensors)
            for key, group in family.biases.items()
        }
        config = model_config(
            file,
            architecture,
            model_class=family.model_class,
            family={**family.config, **biases},
            experts=family.sizes,
        )
        names = _names(file, family, config)
        _check_shapes(file, family, config)
        specs = _specs(file, names, config, dtype)
        config["dtype"] = str(dtype_of_most(specs.values())).removeprefix("torch.")
        notes = _rounded(file, config["dtype"])
        files = {
            "config.json": _json(config),
            "generation_config.json": _json(generation_config(config, file.metadata)),
        }
        try:
            files |= tokenizer_files(file.metadata, max_length=config["max_position_embeddings"])
        except UnknownTokenizer as error:
            files[NO_TOKENIZER] = _json({"message": error.message, "hint": error.hint})
            notes.append(f"no tokenizer is written: {error.message}")
        files[CONVERSION] = _json({"notes": notes})
    work = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        heads = (config["num_attention_heads"], config["num_key_value_heads"])
        _write_weights(file, work, names, specs, heads=heads if family.permuted else None)
        for name, data in files.items():
            write_atomically(work / name, data)
        move(work, output_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return output_dir


def _specs(
    file: GgufFile,
    names: Mapping[str, Place],
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> dict[str, TensorShape]:
    """Dtype and shape of every tensor that is written. A bias that only other linears have is
    zero."""
    stored = {theirs for theirs, _ in names.values() if theirs}
    quantized = any(file.tensors[t].kind.name not in FLOATS for t in stored)
    common = (dtype or torch.bfloat16) if quantized else None
    sizes = {
        "q_proj": config["num_attention_heads"] * config["head_dim"],
        "k_proj": config["num_key_value_heads"] * config["head_dim"],
        "v_proj": config["num_key_value_heads"] * config["head_dim"],
        **dict.fromkeys(("o_proj", "down_proj"), config["hidden_size"]),
        **dict.fromkeys(("gate_proj", "up_proj"), config["intermediate_size"]),
    }
    found = {}
    for name, (theirs, expert) in names.items():
        if theirs:
            kind, shape = file.tensors[theirs].kind.name, file.tensors[theirs].shape
            shape = shape if expert is None else shape[1:]
            found[name] = TensorShape(common or FLOATS[kind], shape)
        else:
            shape = (sizes[name.split(".")[-2]],)
            found[name] = TensorShape(common or torch.float32, shape)
    return found


def _rounded(file: GgufFile, dtype: str) -> list[str]:
    """A note where weights are rounded as they are dequantized."""
    kinds = sorted({t.kind.name for t in file.tensors.values()} - FLOATS.keys())
    if not kinds or dtype == "float32":
        return []
    return [
        f"{file.path.name} is stored as {', '.join(kinds)} and read as {dtype}; "
        "dtype: float32 rounds nothing"
    ]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _names(file: GgufFile, family: _Family, config: Mapping[str, Any]) -> dict[str, Place]:
    """Checkpoint name → where it is in the file, in the order of the model; all of the file once.

    The tensor's name is empty for a bias that is zero because only other linears have one.
    """
    if config["num_hidden_layers"] > len(file.tensors):
        raise InputError(
            f"{file.path.name} promises {config['num_hidden_layers']} blocks, but has only "
            f"{len(file.tensors)} tensors"
        )
    biases = [group for key, group in family.biases.items() if config[key]]
    names: dict[str, Place] = {"model.embed_tokens.weight": (EMBEDDING, None)}
    for i in range(config["num_hidden_layers"]):
        ours_of = {t: f"model.layers.{i}.{ours}" for t, ours in family.block.items()}
        names |= {ours: (f"blk.{i}.{t}", None) for t, ours in ours_of.items()}
        for theirs, ours in (pair for group in biases for pair in group.items()):
            stored = f"blk.{i}.{theirs}"
            names[f"model.layers.{i}.{ours}"] = (stored if stored in file.tensors else "", None)
        for theirs, ours in family.experts.items():
            stack = file.tensors.get(f"blk.{i}.{theirs}")
            for e in range(stack.shape[0] if stack is not None else 1):
                names[f"model.layers.{i}.{ours.format(e=e)}"] = (f"blk.{i}.{theirs}", e)
    names["model.norm.weight"] = ("output_norm.weight", None)
    if HEAD in file.tensors:
        names["lm_head.weight"] = (HEAD, None)
    wanted = list(dict.fromkeys(theirs for theirs, _ in names.values() if theirs))
    missing = [theirs for theirs in wanted if theirs not in file.tensors]
    unknown = sorted(file.tensors.keys() - set(wanted) - {ROPE_FACTORS})
    for found, what in ((missing, "lacks"), (unknown, "has tensors this model does not have:")):
        if found:
            raise unconverted(f"{file.path.name} {what} {several(found, 3)}")
    return names


def _check_shapes(file: GgufFile, family: _Family, config: Mapping[str, Any]) -> None:
    """Refuse a file whose first block, or a stack of experts, is not what its metadata says."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    expected: dict[str, tuple[int, ...]] = {
        "blk.0.attn_q": (config["num_attention_heads"] * head_dim, hidden),
        "blk.0.attn_k": (config["num_key_value_heads"] * head_dim, hidden),
    }
    if family.experts:
        experts = config.get("num_local_experts", config.get("num_experts"))
        inner = config.get("moe_intermediate_size", config["intermediate_size"])
        for i in range(config["num_hidden_layers"]):
            expected[f"blk.{i}.ffn_gate_inp"] = (experts, hidden)
            expected |= {f"blk.{i}.ffn_{x}_exps": (experts, inner, hidden) for x in ("gate", "up")}
            expected[f"blk.{i}.ffn_down_exps"] = (experts, hidden, inner)
    else:
        expected["blk.0.ffn_up"] = (config["intermediate_size"], hidden)
    for name, wanted in expected.items():
        shape = file.tensors[f"{name}.weight"].shape
        if shape != wanted:
            raise InputError(
                f"{file.path.name} says that {name} is {list(wanted)}, but it is {list(shape)}"
            )


def _write_weights(
    file: GgufFile,
    folder: Path,
    names: Mapping[str, Place],
    specs: Mapping[str, TensorShape],
    *,
    heads: tuple[int, int] | None,
) -> None:
    """Shards and their index. `heads`, query and key heads, where q and k are permuted."""
    largest = max(spec.nbytes for spec in specs.values())
    container = Safetensors(max(MAX_SHARD_BYTES, largest))
    layout = container.lay_out([{name: spec} for name, spec in specs.items()])
    for shard in layout.shards:
        with (folder / shard.file).open("wb") as out:
            out.write(shard.fixed[0])
            for name in shard.tensors:
                spec = specs[name]
                theirs, expert = names[name]
                value = file.read(theirs, expert) if theirs else torch.zeros(spec.shape)
                if heads and (".q_proj." in name or ".k_proj." in name):
                    value = halves_from_pairs(value, heads[".k_proj." in name])
                out.write(tensor_bytes(value.to(spec.dtype)))
            out.flush()
            os.fsync(out.fileno())
    for name, data in layout.index.items():
        write_atomically(folder / name, data)
