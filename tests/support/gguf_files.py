"""Small GGUF files as llama.cpp's converter writes them, and tokenizers to put into them."""

import json
from pathlib import Path

import torch
from compressor_calibration.bundled import bundled_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
"""What llama.cpp calls a model_type, where that is another name."""
THEIR_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_tokenizer() -> Tokenizer:
    """A small byte-level BPE trained on real text, every digit a piece of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([bundled_text("calibration", "prose")[:40_000]], trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, **changed) -> dict:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **changed,
    }


def pairs_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k, row by row."""
    size = weight.shape[0] // heads
    order = [
        head * size + half * size // 2 + i
        for head in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]
    return weight[order]


def tiny_model(family: str, *, tied: bool = True, seed: int = 0, **options):
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[family]
    if family != "qwen2":
        options.setdefault("head_dim", 16)
    config = config_class(
        vocab_size=480,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **options,
    )
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif ".experts." in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


def tensors_of(model) -> dict[str, torch.Tensor]:
    """The model's tensors, stacks of gates and ups apart as llama.cpp keeps them."""
    found = {}
    for name, value in model.state_dict().items():
        block, apart, leaf = name.partition(".mlp.experts.")
        if not apart:
            found[name] = value
        elif leaf == "gate_up_proj":
            gate, up = value.chunk(2, 1)
            found |= {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
        else:
            found[f"{block}.ffn_down_exps.weight"] = value
    return found


def write_gguf(path: Path, model, tokenizer: Tokenizer, *, kind="F32", extra=None, **changed):
    """Write a transformers model as llama.cpp's converter does."""
    import gguf

    config = model.config
    family = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, family)
    metadata = {
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{family}.rope.freq_base": config.rope_parameters["rope_theta"],
        **byte_level_metadata(tokenizer),
    }
    if family != "qwen2":
        metadata[f"{family}.attention.key_length"] = config.head_dim
    if config.model_type in ARCHITECTURES:
        metadata[f"{family}.expert_count"] = config.num_local_experts
        metadata[f"{family}.expert_used_count"] = config.num_experts_per_tok
    if family == "qwen3moe":
        metadata[f"{family}.expert_feed_forward_length"] = config.moe_intermediate_size
    for key, value in (metadata | changed).items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, value in {**tensors_of(model), **(extra or {})}.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family == "llama" and ".q_proj." in name:
            value = pairs_from_halves(value, config.num_attention_heads)
        if family == "llama" and ".k_proj." in name:
            value = pairs_from_halves(value, config.num_key_value_heads)
        stem, _, leaf = name.rpartition(".")
        parts = stem.split(".")
        if stem.startswith("model.layers."):
            within = ".".join(parts[3:])
            theirs = f"blk.{parts[2]}.{THEIR_NAMES.get(within, within)}.{leaf}"
        else:
            theirs = f"{THEIR_NAMES.get(stem, stem)}.{leaf}"
        data = value.float().numpy()
        if value.ndim > 1 and kind != "F32":
            writer.add_tensor(theirs, gguf.quantize(data, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(theirs, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
