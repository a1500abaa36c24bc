"""Write a checkpoint of random weights, for measuring speed and memory at real shapes: Llama, or
Qwen3-MoE where the shape has experts.

    python scripts/make_random_model.py FOLDER [--layers 32] [--shape 7b|30b-a3b] [--device cuda]
        [--seed 0]

The weights are drawn one tensor at a time and mean nothing: only time and memory may be measured
with them. The tokenizer is a byte-level one of 256 tokens.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.safetensors import tensor_bytes
from compressor.ir.tensor import TensorShape

SHAPES: dict[str, dict[str, int]] = {
    "30b-a3b": {
        **{"hidden": 2048, "ff": 768, "heads": 32, "kv_heads": 4, "head": 128, "vocab": 32000},
        **{"experts": 128, "chosen": 8},
    },
    "tiny-moe": {
        **{"hidden": 128, "ff": 128, "heads": 4, "kv_heads": 2, "head": 32, "vocab": 512},
        **{"experts": 8, "chosen": 2},
    },
    "7b": {"hidden": 4096, "ff": 11008, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "8b": {"hidden": 4096, "ff": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "wide": {"hidden": 768, "ff": 2048, "heads": 12, "kv_heads": 6, "vocab": 4096},
    "small": {"hidden": 1024, "ff": 2816, "heads": 16, "kv_heads": 8, "vocab": 8192},
    "tiny": {"hidden": 256, "ff": 704, "heads": 8, "kv_heads": 4, "vocab": 512},
}


def shapes_of(size: dict[str, int], layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, in the order of the file."""
    hidden, ff = size["hidden"], size["ff"]
    head = size.get("head", hidden // size["heads"])
    q, kv = head * size["heads"], head * size["kv_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocab"], hidden)}
    for i in range(layers):
        block = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{block}.{name}.weight"] = (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            found[f"{block}.self_attn.{name}_proj.weight"] = (rows, hidden)
        found[f"{block}.self_attn.o_proj.weight"] = (hidden, q)
        parts = [f"{block}.mlp"]
        if "experts" in size:
            found[f"{block}.self_attn.q_norm.weight"] = (head,)
            found[f"{block}.self_attn.k_norm.weight"] = (head,)
            found[f"{block}.mlp.gate.weight"] = (size["experts"], hidden)
            parts = [f"{block}.mlp.experts.{e}" for e in range(size["experts"])]
        for part in parts:
            found[f"{part}.gate_proj.weight"] = (ff, hidden)
            found[f"{part}.up_proj.weight"] = (ff, hidden)
            found[f"{part}.down_proj.weight"] = (hidden, ff)
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (size["vocab"], hidden)
    return found


def write(folder: Path, *, shape: str, layers: int, device: str, seed: int = 0) -> None:
    """Write config, tokenizer, index and shards."""
    size = SHAPES[shape]
    write_tensors(folder, shapes_of(size, layers), device=device, seed=seed)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "intermediate_size": size["ff"],
        "num_hidden_layers": layers,
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "vocab_size": size["vocab"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    if "experts" in size:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": size["head"],
            "num_experts": size["experts"],
            "num_experts_per_tok": size["chosen"],
            "moe_intermediate_size": size["ff"],
            "norm_topk_prob": True,
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_tokenizer(folder)


def write_tensors(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    *,
    device: str,
    seed: int,
    repeated: int | None = None,
) -> None:
    """A new folder with index and shards of random bfloat16 tensors.

    repeated  so many values are drawn, and tensors are pieces of these one after the other, from
              the beginning again at the end: as fast as the disk
    """
    folder.mkdir(parents=True)
    tensors = {name: TensorShape(torch.bfloat16, dims) for name, dims in shapes.items()}
    plan = Safetensors().lay_out([{name: spec} for name, spec in tensors.items()])
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(dims: tuple[int, ...]) -> memoryview:
        noise = torch.randn(dims, generator=generator, device=device)
        scale = 0.02 if len(dims) > 1 else 0.1
        offset = 0.0 if len(dims) > 1 else 1.0
        return tensor_bytes((noise * scale + offset).to(torch.bfloat16))

    stock = None if repeated is None else drawn((repeated, 1))

    def write(number: int) -> None:
        shard, place = plan.shards[number], 2 * 1009 * number
        with (folder / shard.file).open("wb", buffering=0) as handle:
            handle.write(shard.fixed[0])
            for spec in shard.tensors.values():
                if stock is None or len(spec.shape) == 1:
                    _write(handle, drawn(spec.shape))
                    continue
                left = spec.nbytes
                while left:
                    piece = stock[place : place + left]
                    _write(handle, piece)
                    left -= len(piece)
                    place = (place + len(piece)) % len(stock)

    with ThreadPoolExecutor(1 if stock is None else 4) as pool:
        list(pool.map(write, range(len(plan.shards))))
    for name, content in plan.index.items():
        (folder / name).write_bytes(content)


def _write(handle: RawIOBase, data: memoryview) -> None:
    while len(data):
        data = data[handle.write(data) :]


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 tokens and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    write(args.folder, shape=args.shape, layers=args.layers, device=args.device, seed=args.seed)


if __name__ == "__main__":
    main()
