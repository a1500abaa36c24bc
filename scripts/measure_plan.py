"""Writes the headers of a checkpoint in DeepSeek-V3's shape (671 billion weights) over sparse
files, which hold no data, and measures what a plan takes of them, with its map and without.

    python scripts/measure_plan.py FOLDER [--layers 61] [--bf16]

FOLDER needs a file system with sparse files; about 70 MB are written. Without --bf16 the weights
are in float8 with a scale for each block of 128 x 128, as DeepSeek publishes them.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from compressor.checkpoint.container import Safetensors
from compressor.checkpoint.find import locate
from compressor.ir.tensor import TensorShape
from compressor.plan.estimate import estimate
from compressor.plan.plan import make_plan
from compressor.plan.recipe import make_recipe

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
HIDDEN, FF, EXPERT_FF = 7168, 18432, 2048
HEADS, NOPE, ROPE, VALUE, Q_LORA, KV_LORA = 128, 128, 64, 128, 1536, 512


def block(index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name in the block → shape."""
    attention = {
        "q_a_proj": (Q_LORA, HIDDEN),
        "q_b_proj": (HEADS * (NOPE + ROPE), Q_LORA),
        "kv_a_proj_with_mqa": (KV_LORA + ROPE, HIDDEN),
        "kv_b_proj": (HEADS * (NOPE + VALUE), KV_LORA),
        "o_proj": (HIDDEN, HEADS * VALUE),
    }
    yield "input_layernorm", (HIDDEN,)
    yield "post_attention_layernorm", (HIDDEN,)
    yield "self_attn.q_a_layernorm", (Q_LORA,)
    yield "self_attn.kv_a_layernorm", (KV_LORA,)
    for name, shape in attention.items():
        yield f"self_attn.{name}", shape
    if index < CONFIG["first_k_dense_replace"]:
        yield from mlp("mlp", FF)
        return
    yield "mlp.gate", (256, HIDDEN)
    yield from mlp("mlp.shared_experts", EXPERT_FF)
    for expert in range(256):
        yield from mlp(f"mlp.experts.{expert}", EXPERT_FF)


def mlp(path: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.gate_proj", (width, HIDDEN)
    yield f"{path}.up_proj", (width, HIDDEN)
    yield f"{path}.down_proj", (HIDDEN, width)


def tensors(layers: int, *, fp8: bool) -> dict[str, TensorShape]:
    """Every tensor of the checkpoint."""
    vocabulary = (CONFIG["vocab_size"], HIDDEN)
    found = {"model.embed_tokens.weight": TensorShape(torch.bfloat16, vocabulary)}
    for index in range(layers):
        at = f"model.layers.{index}"
        for name, shape in block(index):
            linear = len(shape) == 2 and name != "mlp.gate"
            dtype = torch.float8_e4m3fn if fp8 and linear else torch.bfloat16
            found[f"{at}.{name}.weight"] = TensorShape(dtype, shape)
            if fp8 and linear:
                grid = tuple(-(-n // 128) for n in shape)
                found[f"{at}.{name}.weight_scale_inv"] = TensorShape(torch.float32, grid)
        if index >= CONFIG["first_k_dense_replace"]:
            bias = TensorShape(torch.float32, (256,))
            found[f"{at}.mlp.gate.e_score_correction_bias"] = bias
    found["model.norm.weight"] = TensorShape(torch.bfloat16, (HIDDEN,))
    found["lm_head.weight"] = TensorShape(torch.bfloat16, vocabulary)
    return found


def write(folder: Path, layers: int, *, fp8: bool) -> None:
    """Config, index, and files that end where their data would."""
    folder.mkdir(parents=True)
    every = tensors(layers, fp8=fp8)
    plan = Safetensors().lay_out([{name: spec} for name, spec in every.items()])
    for shard in plan.shards:
        with (folder / shard.file).open("wb") as handle:
            handle.write(shard.fixed[0])
            size = sum(spec.nbytes for spec in shard.tensors.values())
            handle.truncate(handle.tell() + size)
    for name, content in plan.index.items():
        (folder / name).write_bytes(content)
    config = {**CONFIG, "num_hidden_layers": layers}
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    apparent = sum(path.stat().st_size for path in folder.iterdir())
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    print(f"{len(every)} tensors, {apparent / 1e9:.0f} GB in files of {on_disk / 1e6:.0f} MB")


def measure(folder: Path, *, mapped: bool) -> None:
    """Time and peak memory of a plan, and what it says of bytes, time and memory."""
    chosen = None if mapped else "none"
    data = {
        "model": str(folder) if mapped else {"path": str(folder), "map": "none"},
        "output": "out",
        "dequantize_source": True,
        "passes": [{"rtn": {"bits": 4, "group_size": 128}}],
    }
    start, busy = time.perf_counter(), time.process_time()
    located = locate(str(folder), fetch=True, to_plan=True, chosen=chosen)
    plan = make_plan(make_recipe(data), located.source)
    found = estimate(plan, device=torch.device("cpu"), resident=0)
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{'with its map' if mapped else 'without a map'}: {seconds:.1f} s ({cpu:.1f} s of one "
        f"core), peak memory so far {peak:.2f} GB\n"
        f"  {found.source_bytes / 1e9:.0f} GB become {found.output_bytes / 1e9:.0f} GB in about "
        f"{found.seconds / 60:.0f} minutes with {found.host_bytes / 1e9:.0f} GB of host memory"
    )


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    write(args.folder, args.layers, fp8=not args.bf16)
    measure(args.folder, mapped=True)
    measure(args.folder, mapped=False)


if __name__ == "__main__":
    main()
