"""Tiny seeded checkpoints of every architecture, with a tokenizer, for tests of the whole pipeline.

Sizes differ from each other wherever the family lets them, and no parameter keeps its initial
value, so that a swapped dimension or a forgotten norm weight or bias shows.
"""

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

from tests.support.families import COMMON, FAMILIES, WRAPPERS

BOS, EOS = "<s>", "</s>"

TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "opt", "mixtral"),
    "qwen3_moe",
)
"""Families that most tests go through."""

MORE_TYPES = tuple(name for name in (*FAMILIES, *WRAPPERS) if name not in TYPES)
"""All others, and their layouts; `arch/test_families.py` has them."""

OTHER_NAMES = {
    **dict.fromkeys(
        ("opt", "gpt2", "bloom", "gptj", "codegen", "gpt_bigcode"),
        ("intermediate_size", "num_key_value_heads"),
    ),
    **dict.fromkeys(
        ("mamba", "falcon_mamba", "mamba2"),
        ("intermediate_size", "num_key_value_heads", "num_attention_heads"),
    ),
    "mpt": (
        *("intermediate_size", "num_key_value_heads", "hidden_size"),
        *("num_attention_heads", "num_hidden_layers"),
    ),
}
"""Families → which of the common keys they know by other names."""


def build(
    model_type: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny checkpoint of a family into `folder`; overrides go into its config."""
    if model_type in WRAPPERS:
        text, own, tower = WRAPPERS[model_type]
        inner = {"model_type": text, **COMMON, **own, **overrides}
        values: dict[str, Any] = {"text_config": inner, "vision_config": tower}
    else:
        values = {**COMMON, **FAMILIES[model_type], **overrides}
        for key in OTHER_NAMES.get(model_type, ()):
            values.pop(key, None)
    config = AutoConfig.for_model(model_type.partition(" ")[0], **values)
    kind = AutoModelForImageTextToText if model_type in WRAPPERS else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # some parameters, A_log for one, keep what they start from
        model = kind.from_config(config)
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
    assert len(vocabulary) == COMMON["vocab_size"]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, model_max_length=256
    )
