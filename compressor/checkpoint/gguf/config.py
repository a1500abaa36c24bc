"""config.json from the metadata of a GGUF file.

Every key of the architecture is read, known to change nothing, or refused by name: a key that
changes what the model computes and is passed over would be a silent fault. Where a key is partial
or old, llama.cpp's reading is taken.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from compressor.checkpoint.gguf.file import GgufFile
from compressor.errors import InputError

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"

SPECIAL_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""Tokens at which llama.cpp stops beside EOS."""
NO_TOKEN = (2**32 - 1, -1)
"""What stands for "there is none" where a key has to hold an id."""

UNUSED = {
    *("tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "decoder_start_token_id"),
    *("attention.layer_norm_epsilon", "expert_weights_norm", "vocab_size"),
}
"""Keys that llama.cpp does not read for these decoders with RMS norms, or that only describe."""
OF_EXPERTS = ("expert_count", "expert_used_count", "expert_gating_func")
SOFTMAX = 1
"""The gating function of the mixtures that are read; the chosen experts' weights sum to 1."""
NEUTRAL = {
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (0, 1)),
    **dict.fromkeys(("expert_weights_scale", "attention.output_scale"), (0, 1)),
    "attention.causal": (True,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (-1, 1),
}
"""Values with which a key changes nothing; of any other key zero and nothing do not."""


def unconverted(message: str) -> InputError:
    """Of what is not known here, or has no place in a config of transformers."""
    return InputError(message, hint="use its Hugging Face checkpoint")


@dataclass(slots=True)
class _Keys:
    """The architecture's keys, and which of them were read."""

    file: GgufFile
    architecture: str
    read: set[str] = field(default_factory=set)

    def value(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        found = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(found, list) and found and all(item == found[0] for item in found):
            found = found[0]  # stated for each layer, and the same in all
        return found

    def number(self, key: str, default: Any = None) -> Any:
        """A positive number. Raises InputError for anything else."""
        value = self.value(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(
                f"{self.file.path.name} says {self.architecture}.{key} is {value!r}; one positive "
                "number is needed"
            )
        # Numbers are stored as fp32: 9.99999974e-06 is meant to be 1e-05.
        return value if isinstance(value, int) else float(str(np.float32(value)))

    def refuse_rest(self) -> None:
        """Raises InputError for a key that was not read and may change what is computed."""
        for name, value in self.file.metadata.items():
            key = name.removeprefix(f"{self.architecture}.")
            if key == name or key in self.read or key in UNUSED:
                continue
            values = value if isinstance(value, list) else [value]
            neutral = NEUTRAL.get(key)
            if key.startswith("rope.scaling.yarn_") and self.value("rope.scaling.type") != "yarn":
                neutral = (*(neutral or ()), 0)
            if all(not item if neutral is None else item in neutral for item in values):
                continue
            raise unconverted(
                f"{self.file.path.name} says {name} is {value!r}, which is not converted"
            )


def model_config(
    file: GgufFile,
    architecture: str,
    *,
    model_class: str,
    family: Mapping[str, Any],
    experts: Mapping[str, str],
) -> dict[str, Any]:
    """config.json without its dtype.

    family   keys that the file does not state
    experts  key of config.json → key of the file, for what a mixture states beside
    Raises InputError for what is missing, contradicts itself, or has no place in such a config.
    """
    keys = _Keys(file, architecture)
    name = file.path.name
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise InputError(f"{name} holds no model, but is of the type {kind!r}")
    stated = {key: keys.value(key, 0) for key in OF_EXPERTS}
    if experts and stated["expert_gating_func"] not in (0, SOFTMAX):
        raise unconverted(
            f"{name} says {architecture}.expert_gating_func is {stated['expert_gating_func']!r}, "
            "which is not converted"
        )
    if EMBEDDING not in file.tensors:
        raise InputError(f"{name} has no {EMBEDDING}")
    rows = file.tensors[EMBEDDING].shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    for what, count in (
        (f"{architecture}.vocab_size", file.metadata.get(f"{architecture}.vocab_size", rows)),
        ("the tokenizer's length", rows if not isinstance(tokens, list) else len(tokens)),
    ):
        if count != rows and (what.endswith("vocab_size") or count > rows):
            raise InputError(f"{name} says {what} is {count!r}, but embeds {rows} tokens")
    heads, hidden = keys.number("attention.head_count"), keys.number("embedding_length")
    head_dim = keys.number("attention.key_length", hidden // heads)
    if keys.number("rope.dimension_count", head_dim) != head_dim:
        raise unconverted(f"{name} rotates only a part of each head")
    if (width := keys.value("attention.value_length", head_dim)) != head_dim:
        raise InputError(f"{name} has values of {width!r} channels for keys of {head_dim}")
    context = keys.number("context_length")
    _check_attention(keys, head_dim=head_dim, context=context)
    theta = keys.number("rope.freq_base", 10000.0)
    scaling = _rope_scaling(keys, theta=theta, head_dim=head_dim, context=context)
    config = {
        "architectures": [model_class],
        "model_type": architecture,
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": keys.number("feed_forward_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling},
        # For readers older than rope_parameters, which would fall back on a base of their own.
        "rope_theta": theta,
        "tie_word_embeddings": HEAD not in file.tensors,
        **{ours: keys.number(theirs) for ours, theirs in experts.items()},
        **family,
    }
    if scaling:
        config["rope_scaling"] = scaling
    keys.refuse_rest()
    special = {name: token_id(file.metadata, key) for name, key in SPECIAL_IDS.items()}
    return config | {name: index for name, index in special.items() if index is not None}


def generation_config(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the special tokens, and all at which a text ends."""
    found = {key: config[key] for key in SPECIAL_IDS if key in config}
    ends = [found.get("eos_token_id"), *(token_id(metadata, key) for key in ENDS)]
    stated = list(dict.fromkeys(index for index in ends if index is not None))
    return found | ({"eos_token_id": stated} if len(stated) > 1 else {})


def token_id(metadata: Mapping[str, Any], key: str) -> int | None:
    """A special token's id, None where there is none. Raises InputError for one beyond the
    vocabulary."""
    index = metadata.get(key)
    if index is None or index in NO_TOKEN:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    if type(index) is not int or not 0 <= index < count:
        raise InputError(f"the GGUF file says {key} is {index!r}; it has {count} tokens")
    return index


def _check_attention(keys: _Keys, *, head_dim: int, context: int) -> None:
    """A window that never binds and the usual scale change nothing; others are refused."""
    name, architecture = keys.file.path.name, keys.architecture
    window = keys.value("attention.sliding_window", 0)
    if window and not (type(window) is int and window >= context):
        raise unconverted(
            f"{name} says {architecture}.attention.sliding_window is {window!r}, below its context "
            f"of {context}: a window is not converted"
        )
    scale = keys.value("attention.scale", 0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise unconverted(
            f"{name} says {architecture}.attention.scale is {scale!r}, which is not converted"
        )


def _rope_scaling(keys: _Keys, *, theta: float, head_dim: int, context: int) -> dict[str, Any]:
    """What config.json says about stretched rotary frequencies; empty where they are not.

    As llama.cpp reads it: a factor without a type is linear, `rope.scale_linear` is the factor's
    name of 2023, a factor of 0 is none, and the type "none" makes a factor idle.
    """
    name, prefix = keys.file.path.name, f"{keys.architecture}.rope.scaling"
    kind = keys.value("rope.scaling.type", "linear")
    old = keys.value("rope.scale_linear", 0.0)
    factor = keys.value("rope.scaling.factor", old) or 1.0
    original = keys.value("rope.scaling.original_context_length", 0) or 0
    attention = keys.value("rope.scaling.attn_factor", 0.0) or 1.0
    fast = keys.value("rope.scaling.yarn_beta_fast", 0.0) or 32.0
    slow = keys.value("rope.scaling.yarn_beta_slow", 0.0) or 1.0
    numbers = (factor, original, attention, fast, slow)
    if any(type(n) not in (int, float) or not 0 <= n < math.inf for n in numbers):
        raise InputError(f"{name}: {prefix} holds {numbers!r}; positive numbers are needed")
    if kind not in ("none", "linear", "yarn"):
        raise unconverted(f"{name} stretches its rotary frequencies by {kind!r}")
    factor = 1.0 if kind == "none" else float(str(np.float32(factor)))
    attention = float(str(np.float32(attention)))
    if kind != "yarn" and attention != 1:
        raise InputError(f"{name} says {prefix}.attn_factor is {attention}, which needs yarn")
    if ROPE_FACTORS in keys.file.tensors:
        if factor != 1:
            raise unconverted(
                f"{name} stretches its rotary frequencies twice, by {ROPE_FACTORS} and by {kind!r}"
            )
        return _llama3(keys.file, theta=theta, head_dim=head_dim, original=int(original) or 8192)
    if kind == "yarn" and factor == 1:
        raise unconverted(f"{name} says {prefix}.type is 'yarn', but states no factor")
    if kind == "yarn":
        # The temperature of the attention is the method's own unless the file multiplies it.
        temperature = {"attention_factor": attention * (0.1 * math.log(factor) + 1)}
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(original) or context,
            "beta_fast": float(fast),
            "beta_slow": float(slow),
            **(temperature if attention != 1 else {}),
        }
    return {"rope_type": "linear", "factor": factor} if factor != 1 else {}


def _llama3(file: GgufFile, *, theta: float, head_dim: int, original: int) -> dict[str, Any]:
    """Llama 3's stretching, which llama.cpp stores as finished divisors of the frequencies.

    Its parameters are recovered only where they are those of the published models and give the
    same divisors.
    """
    divisors = file.read(ROPE_FACTORS).double()
    if bool((divisors == 1).all()):
        return {}
    factor = round(float(divisors.max()), 3)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    turns = original * theta ** (-pairs / head_dim) / (2 * math.pi)
    smooth = ((turns - 1) / (4 - 1)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise unconverted(
            f"{file.path.name} stretches its rotary frequencies in a way that is not Llama 3's"
        )
    return scaling
