"""Write a checkpoint of random weights, for measuring speed and memory at real shapes.

    python scripts/make_random_model.py FOLDER [--shape 7b] [--layers 32] [--seed 0] [--uneven]
    python scripts/make_random_model.py FOLDER --shape deepseek-v3 --sparse

The weights are pieces of 2^26 values that are drawn, and mean nothing: only time and memory may be
measured with them. The tokenizer is a byte-level one of 256 tokens. With --sparse the files are
headers over holes, for a file system that has them: enough for `compress plan`.
"""

import json
import os
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.safetensors import tensor_bytes
from compressor.ir.tensor import TensorShape

Config = dict[str, Any]
Dims = tuple[int, ...]

COMMON: Config = {
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}


def family(
    model_type: str, layers: int, hidden: int, ff: int, heads: int, kv_heads: int, **more: Any
) -> Config:
    """A config.json; heads are of 128 unless `more` says otherwise."""
    return {
        **COMMON,
        "model_type": model_type,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        **more,
    }


def qwen3_moe(experts: int, chosen: int, ff: int) -> Config:
    """What Qwen3's mixtures say beside."""
    return {
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": ff,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


SHAPES: dict[str, Config] = {
    "tiny": family("llama", 32, 256, 704, 8, 4, head_dim=32),
    "tiny-moe": family(
        "qwen3_moe", 32, 128, 128, 4, 2, head_dim=32, **qwen3_moe(8, 2, 128)
    ),
    "small": family("llama", 32, 1024, 2816, 16, 8, head_dim=64, vocab_size=8192),
    "wide": family("llama", 32, 768, 2048, 12, 6, head_dim=64, vocab_size=4096),
    "7b": family("llama", 32, 4096, 11008, 32, 32, vocab_size=32000),
    "8b": family("llama", 32, 4096, 14336, 32, 8, vocab_size=128256),
    "30b-a3b": family(
        "qwen3_moe", 32, 2048, 768, 32, 4, vocab_size=32000, **qwen3_moe(128, 8, 768)
    ),
    # Large ones, of which a block is measured, have a small vocabulary.
    "llama-3-70b": family("llama", 80, 8192, 28672, 64, 8),
    "llama-3-405b": family("llama", 126, 16384, 53248, 128, 8),
    "mixtral-8x22b": family(
        "mixtral", 56, 6144, 16384, 48, 8,
        num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
    ),
    "qwen3-235b-a22b": family(
        "qwen3_moe", 94, 4096, 12288, 64, 4, **qwen3_moe(128, 8, 1536)
    ),
    "deepseek-v3": family(
        "deepseek_v3", 61, 7168, 18432, 128, 128,
        head_dim=64, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
        num_experts_per_tok=8, n_group=8, topk_group=4, norm_topk_prob=True,
        routed_scaling_factor=2.5, first_k_dense_replace=3, num_nextn_predict_layers=0,
        q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128,
    ),
}  # fmt: skip


def smaller(config: Config) -> Config:
    """The same with sides that a CPU takes."""
    latent = "kv_lora_rank" in config
    sides = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if latent else 2,
        "head_dim": 32 if latent else 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    }
    return config | {key: value for key, value in sides.items() if key in config}


def shapes_of(config: Config, layers: int) -> dict[str, Dims]:
    """Tensor name → shape, in the order of the files, as transformers would save the model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**config, "num_hidden_layers": layers})
        )
    saved = revert_weight_conversion(model, model.state_dict())

    def place(name: str) -> int:
        block = re.search(r"\.layers\.(\d+)\.", name)
        return int(block[1]) if block else -1 if "embed" in name else layers

    return {name: tuple(saved[name].shape) for name in sorted(saved, key=place)}


def block(config: Config, layer: int) -> dict[str, Dims]:
    """Those of one block."""
    shapes = shapes_of(config, layer + 1)
    return {name: dims for name, dims in shapes.items() if f".layers.{layer}." in name}


STOCK, ROW = 2**26 + 1, 8192
"""Values that are drawn, and how many of them are as large as each other."""


def write(
    folder: Path,
    config: Config,
    *,
    layers: int,
    seed: int = 0,
    uneven: bool = False,
    sparse: bool = False,
) -> None:
    """A new folder with config, tokenizer, index and shards of random bfloat16 tensors, many files
    at a time: as fast as the disk.

    uneven  rows of weights, and norms' values, differ in size by factors of e^(0.7·N(0, 1)), so
            that channels are unlike as those of trained models are
    sparse  shards have holes for the data, so that headers alone take room
    """
    folder.mkdir(parents=True)
    shapes = shapes_of(config, layers)
    units = [{name: TensorShape(torch.bfloat16, dims)} for name, dims in shapes.items()]
    plan = Safetensors(5 * 10**9 if sparse else 2**30).lay_out(units)
    size = sum(torch.Size(dims).numel() for dims in shapes.values())
    stocks = () if sparse else drawn(min(STOCK, size), seed=seed, uneven=uneven)

    def shard(number: int) -> None:
        written, place = plan.shards[number], 2 * 1009 * number
        with (folder / written.file).open("wb", buffering=0) as handle:
            handle.write(written.fixed[0])
            if sparse:
                handle.truncate(written.size)
                return
            for spec in written.tensors.values():
                stock, left = stocks[len(spec.shape) == 1], spec.nbytes
                while left:
                    place %= len(stock)
                    put = handle.write(stock[place : place + left])
                    left, place = left - put, place + put

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(shard, range(len(plan.shards))))
    for name, content in plan.index.items():
        (folder / name).write_bytes(content)
    whole = {**config, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(whole, indent=2))
    save_tokenizer(folder)


def drawn(count: int, *, seed: int, uneven: bool) -> list[memoryview]:
    """Bytes of weights and of norms, of which tensors are pieces, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=generator)
    norms = (0.7 * noise[:ROW]).exp() if uneven else 1 + 0.1 * noise[:ROW]
    weights = 0.02 * noise
    if uneven:
        scales = (0.7 * torch.randn(-(-count // ROW), generator=generator)).exp()
        weights *= scales.repeat_interleave(ROW)[:count]
    return [tensor_bytes(values.to(torch.bfloat16)) for values in (weights, norms)]


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
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="default: as many as the model has")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--uneven", action="store_true", help="channels of unlike sizes")
    parser.add_argument("--sparse", action="store_true", help="headers over holes")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    layers = args.layers or config["num_hidden_layers"]
    write(
        args.folder, config, layers=layers, seed=args.seed, uneven=args.uneven, sparse=args.sparse
    )


if __name__ == "__main__":
    main()
