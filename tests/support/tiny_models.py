"""Tiny seeded checkpoints of every architecture, with a tokenizer, for tests of the whole pipeline.

Sizes differ from each other wherever the family lets them, and no parameter keeps its initial
value, so that a swapped dimension or a forgotten norm weight or bias shows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 256
BOS, EOS = "<s>", "</s>"

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32},
    "phi3": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "head_dim": 32,
        **EXPERTS,
    },
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, **SHARED, **EXPERTS},
    "qwen3_next": {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        **SHARED,
        **EXPERTS,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        **EXPERTS,
    },
    "gpt_oss": {"head_dim": 32, "num_local_experts": 4, "sliding_window": 32, **EXPERTS},
    "smollm3": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "seed_oss": {"head_dim": 32, "attention_out_bias": True},
    "ministral": {"head_dim": 32, "sliding_window": 32},
    "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32},
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MORE_TYPES = (
    *("cohere", "gpt_neox", "qwen2_moe", "qwen3_next", "deepseek_v3", "gpt_oss", "gemma3"),
    *("smollm3", "granite", "seed_oss", "ministral"),
)
"""Families whose blocks are built otherwise; `arch/test_families.py` runs them from end to end."""

TYPES = tuple(family for family in FAMILIES if family not in MORE_TYPES)


def build(
    model_type: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny checkpoint of a family into `folder`; overrides go into its config."""
    values = {**COMMON, **FAMILIES[model_type], **overrides}
    if model_type == "opt":
        values = {k: v for k, v in values.items() if k not in ("intermediate_size",)}
        values.pop("num_key_value_heads")
    if model_type == "gpt_oss":
        values.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    if model_type == "gemma3":
        values = {"text_config": values, "vision_config": VISION, "mm_tokens_per_image": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # some parameters, A_log for one, keep what they start from
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            elif name.endswith(".bias"):
                parameter.copy_(noise * 0.2)
            else:
                # What it starts from says whether the norm multiplies by weight or 1 + weight.
                parameter.add_(noise * 0.3)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 256 tokens: every byte UTF-8 uses, and two special tokens."""
    never = {"À", "Á"}  # what stands for the bytes 0xC0 and 0xC1, which no UTF-8 text has
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - never)
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, *alphabet])}
    assert len(vocabulary) == VOCAB
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, model_max_length=256
    )
