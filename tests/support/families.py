"""What configs of tiny models say beside the sizes that all have, by family."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"shared_expert_intermediate_size": 64}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
GROUPED = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    **EXPERTS,
}
LINEAR = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "patch_size": 14,
}
MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
}

GEMMA_4 = {
    "head_dim": 32,
    "global_head_dim": 48,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 256,
}
GEMMA_4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32},
    "phi3": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "norm_topk_prob": True,
        "head_dim": 32,
        **EXPERTS,
    },
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {},
    "qwen2_moe": {"num_experts": 4, **SHARED, **EXPERTS},
    "qwen3_next": {**LINEAR, "num_experts": 4, **SHARED, **EXPERTS},
    "deepseek_v3": {**MLA, **GROUPED},
    "gpt_oss": {
        "head_dim": 32,
        "num_local_experts": 4,
        "sliding_window": 32,
        "num_experts_per_tok": 2,
    },
    "smollm3": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "seed_oss": {"head_dim": 32, "attention_out_bias": True},
    "ministral": {"head_dim": 32, "sliding_window": 32},
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "logits_scaling": 4.0,
    },
    "internlm3": {"bias": True, "qkv_bias": True},
    "exaone4": {
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 32,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {"head_dim": 32},
    "apertus": {},
    "qwen3_5_text": {**LINEAR},
    "qwen3_5_moe_text": {**LINEAR, "num_experts": 4, **SHARED, **EXPERTS},
    "glm": {"head_dim": 32, "attention_bias": True},
    "glm4": {"head_dim": 32, "attention_bias": True},
    "glm4_moe": {"head_dim": 32, **GROUPED, "attention_bias": True, "use_qk_norm": True},
    "glm4_moe_lite": {**MLA, **GROUPED, "mlp_layer_types": ["dense", "sparse"]},
    "glm_moe_dsa": {
        **MLA,
        **GROUPED,
        "mlp_layer_types": ["dense", "sparse"],
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 16,
    },
    "deepseek_v32": {
        **MLA,
        **GROUPED,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 16,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "deepseek_v2": {**MLA, **GROUPED, "topk_method": "greedy"},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_intermediate_size": 32,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "llama4_text": {
        "num_hidden_layers": 2,
        "moe_layers": [1],
        "intermediate_size_mlp": 80,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 32,
        "attention_chunk_size": 32,
        "no_rope_layers": [1, 0],
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "intermediate_size": 96,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_experts": 4,
        "num_dense_layers": 1,
        **EXPERTS,
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "head_dim": 32,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 48,
        "n_group": 1,
        "topk_group": 1,
        "mamba_chunk_size": 16,
        "chunk_size": 16,
        **EXPERTS,
    },
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32},
    "gemma4_text": {
        **GEMMA_4,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        **GEMMA_4_EXPERTS,
    },
    "gemma4_text dense": GEMMA_4,
    "cohere2": {"logit_scale": 0.25, "sliding_window": 32},
    "phi": {"qk_layernorm": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96},
    "starcoder2": {"sliding_window": 32},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
    "falcon mha": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
        "ffn_hidden_size": 96,
    },
    "falcon mqa": {
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "ffn_hidden_size": 96,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256},
}
"""Family → what is its own; after a space, another of its layouts."""

WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 32}, VISION),
    "llava": ("llama", {}, VISION),
    "llava_next": ("llama", {}, VISION),
    "mistral3": ("mistral", {"head_dim": 32}, {**VISION, "head_dim": 16, "model_type": "pixtral"}),
    "qwen2_vl": (
        "qwen2_vl_text",
        MROPE,
        {
            "depth": 1,
            "embed_dim": 32,
            "num_heads": 2,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
    ),
    "qwen2_5_vl": ("qwen2_5_vl_text", MROPE, QWEN_VISION),
    "qwen3_vl": (
        "qwen3_vl_text",
        {"head_dim": 16, **MROPE},
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe_text",
        {"head_dim": 16, "num_experts": 4, **EXPERTS, **MROPE},
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": ("qwen3_5_text", FAMILIES["qwen3_5_text"], QWEN_VISION),
    "qwen3_5_moe": ("qwen3_5_moe_text", FAMILIES["qwen3_5_moe_text"], QWEN_VISION),
    "llama4": (
        "llama4_text",
        FAMILIES["llama4_text"],
        {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "gemma4": (
        "gemma4_text",
        FAMILIES["gemma4_text"],
        {**VISION, "head_dim": 16, "num_key_value_heads": 2, "global_head_dim": 16},
    ),
}
"""Model with a tower → its text model's type, what is the text's own, the tower."""
