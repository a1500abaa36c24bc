"""One block of each large model's shape by AWQ on the GPU: seconds, and memory beside the planned.

    python scripts/bench/blocks.py SCRATCH [--shapes llama-3-70b deepseek-v3] [--device-memory 8GB]
    python scripts/bench/blocks.py SCRATCH --tiny --device cpu

Weights are random, drawn once and repeated, and written to SCRATCH as a checkpoint with three
blocks of the shape and 512 tokens of vocabulary; the second block is what counts, which makes the
inputs of the third (of a block above 16 GB there is one, so that reading it and compiling kernels
is in its time, and making inputs is not). 128 × 512 tokens, W4 asymmetric, groups of 128, scales
and clipping searched; each run is a process of its own, forked after the imports. `read_s` is what
reading and hashing the block took, while the one before was worked on. The whole model is its
blocks times the seconds of one: no embedding, no head, no start. A line of JSON each, then a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_random_model import save_tokenizer, write_tensors

from compressor.errors import CompressError
from compressor.ir.unit import Unit
from compressor.plan.recipe import make_recipe, parse_size
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.run.settings import UnitDone
from compressor.run.source_content import SourceContent

VOCABULARY = 512
LARGE = 16e9
STOCK = 2**26 + 1
"""Random weights that are drawn; all tensors are pieces of them, one after the other."""
COMMON = {
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}


def attention(hidden: int, heads: int, kv_heads: int, head_dim: int = 128) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama-3-70b": (
        80,
        {"model_type": "llama", **attention(8192, 64, 8), "intermediate_size": 28672},
    ),
    "llama-3-405b": (
        126,
        {"model_type": "llama", **attention(16384, 128, 8), "intermediate_size": 53248},
    ),
    "mixtral-8x22b": (
        56,
        {
            "model_type": "mixtral",
            **attention(6144, 48, 8),
            "intermediate_size": 16384,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
    "qwen3-235b-a22b": (
        94,
        {
            "model_type": "qwen3_moe",
            **attention(4096, 64, 4),
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "deepseek-v3": (
        58,
        {
            "model_type": "deepseek_v3",
            **attention(7168, 128, 128, 64),
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
    ),
}
"""Name → how many such blocks it has, and its config.json."""


def smaller(config: dict[str, Any]) -> dict[str, Any]:
    """The same with sides that a CPU takes."""
    sides = {
        **(attention(256, 4, 4, 32) if "kv_lora_rank" in config else attention(256, 4, 2, 64)),
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


def block(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a block, by their names in it."""
    hidden, heads, dim = (
        config[f"{key}"] for key in ("hidden_size", "num_attention_heads", "head_dim")
    )
    queries, keys = heads * dim, config["num_key_value_heads"] * dim
    ff, kind = config["intermediate_size"], config["model_type"]
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if kind == "deepseek_v3":
        rope, nope, value = (config[f"{k}_head_dim"] for k in ("qk_rope", "qk_nope", "v"))
        q, kv = config["q_lora_rank"], config["kv_lora_rank"]
        inside = {
            "q_a_proj": (q, hidden),
            "q_a_layernorm": (q,),
            "q_b_proj": (heads * (nope + rope), q),
            "kv_a_proj_with_mqa": (kv + rope, hidden),
            "kv_a_layernorm": (kv,),
            "kv_b_proj": (heads * (nope + value), kv),
            "o_proj": (hidden, heads * value),
        }
    else:
        inside = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        }
        if kind == "qwen3_moe":
            inside |= {"q_norm": (dim,), "k_norm": (dim,)}
    found |= {f"self_attn.{name}": shape for name, shape in inside.items()}

    def mlp(path: str, ff: int, names: tuple[str, str, str]) -> dict[str, tuple[int, ...]]:
        shapes = ((ff, hidden), (ff, hidden), (hidden, ff))
        return {f"{path}.{name}": shape for name, shape in zip(names, shapes, strict=True)}

    plain = ("gate_proj", "up_proj", "down_proj")
    if kind == "llama":
        return found | mlp("mlp", ff, plain)
    path, names = ("block_sparse_moe", ("w1", "w3", "w2")) if kind == "mixtral" else ("mlp", plain)
    experts = next(
        config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config
    )
    inner = config.get("moe_intermediate_size", ff)
    found[f"{path}.gate"] = (experts, hidden)
    for expert in range(experts):
        found |= mlp(f"{path}.experts.{expert}", inner, names)
    if kind == "deepseek_v3":
        found |= mlp("mlp.shared_experts", inner * config["n_shared_experts"], plain)
    return found


def make(folder: Path, config: dict[str, Any], blocks: int, device: str) -> None:
    """A checkpoint of random weights."""
    width = config["hidden_size"]
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for layer in range(blocks):
        for name, shape in block(config).items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        if config["model_type"] == "deepseek_v3":
            bias = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            shapes[bias] = (config["n_routed_experts"],)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}
    write_tensors(folder, shapes, device=device, seed=0, repeated=STOCK)
    whole = {**COMMON, **config, "num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(whole, indent=2))
    save_tokenizer(folder)


def run(folder: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run over it."""
    size = 32 if options.tiny else 128
    awq = {"bits": 4, "group_size": size, "symmetric": False}
    rows = {"samples": 4, "length": 64} if options.tiny else {"samples": 128, "length": 512}
    recipe = {
        "model": str(folder),
        "output": str(output),
        "passes": [{"awq": awq}],
        "calibration": {"data": "bundled/prose", **rows},
        "verify": False,
        "report": False,
    }
    device = choose_device(options.device)
    prepared = prepare(make_recipe(recipe), device=device, device_memory=options.device_memory)
    counted = min(2, len(prepared.plan.layout.blocks))
    reads: dict[int, float] = {}
    read = SourceContent.read

    def timed(self: SourceContent, index: int, *, pin: bool = False) -> Unit:
        began = time.perf_counter()
        found = read(self, index, pin=pin)
        reads[index] = time.perf_counter() - began
        return found

    SourceContent.read = timed  # type: ignore[method-assign]  # in this process, which ends here
    watched = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def done(unit: UnitDone) -> None:
        if options.profile and unit.index == counted - 1:
            watched.start()
        if options.profile and unit.index == counted:
            watched.stop()

    made = compile_checkpoint(prepared, on_unit=done)
    block = made.units[counted]
    if options.profile:
        by = "self_cpu_time_total" if device.type == "cpu" else "self_cuda_time_total"
        table = watched.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60)
        with options.profile.open("a") as file:
            file.write(f"{folder.name}\n{table}\n")
    planned = prepared.estimates
    return {
        "block_s": round(block.seconds, 2),
        "read_s": round(reads[counted], 2),
        "device_gb": round(max(unit.peak_device for unit in made.units) / 1e9, 2),
        "planned_device_gb": round(planned.device_bytes / 1e9, 2),
        "host_gb": round(max(unit.peak_rss for unit in made.units) / 1e9, 2),
        "planned_host_gb": round(planned.host_bytes / 1e9, 2),
    }


def apart(work: Any, *args: Any) -> Any:
    """What a function gives in a process of its own, or why it gives nothing."""

    def tell() -> None:
        try:
            there.send(work(*args))
        except (CompressError, RuntimeError, ValueError) as error:
            there.send(f"{type(error).__name__}: {error}")
        there.close()
        os._exit(0)

    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=tell)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return "the process died"
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path, help="folder for models and outputs")
    parser.add_argument("--shapes", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device-memory", type=parse_size, help="as for compress run")
    parser.add_argument(
        "--profile", type=Path, help="add a table of the last block's kernels to it"
    )
    parser.add_argument("--tiny", action="store_true", help="small sides, to try the script")
    options = parser.parse_args()
    import transformers.models.auto.modeling_auto  # noqa: F401  # once, for all forks

    rows = {}
    for name in options.shapes:
        layers, config = MODELS[name]
        config = smaller(config) if options.tiny else config
        nbytes = 2 * sum(torch.Size(shape).numel() for shape in block(config).values())
        folder, output = options.scratch / name, options.scratch / "out"
        made = apart(make, folder, config, 1 if nbytes > LARGE else 3, options.device)
        row = {"why": made} if made else apart(run, folder, output, options)
        if isinstance(row, dict) and "block_s" in row:
            row["model_s"] = round(row["block_s"] * layers)
            rows[name] = row
        print(
            json.dumps({"what": name, "block_gb": round(nbytes / 1e9, 2), "found": row}), flush=True
        )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
    for number, (name, row) in enumerate(rows.items()):
        if number == 0:
            print(f"\n| one block of | {' | '.join(row)} |\n|{'---|' * (len(row) + 1)}")
        print(f"| {name} | {' | '.join(str(value) for value in row.values())} |")


if __name__ == "__main__":
    main()
