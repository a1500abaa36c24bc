"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF file.

A file gives the vocabulary, the merges or scores, and a name for how text is split before merging;
the splitting itself is known by that name only, so a name that is not known here is refused: a
tokenizer that splits differently would be wrong without a sign of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from compressor.checkpoint.gguf.config import token_id
from compressor.errors import InputError

# Kinds of token, as tokenizer.ggml.token_type counts them.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

TEMPLATE = "tokenizer.chat_template"
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class UnknownTokenizer(InputError):
    """How the file's model splits text is not known here; its weights may be used without text."""


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How a byte-level tokenizer cuts text before it merges.

    pattern        what is a piece; None for GPT-2's own
    digits         every digit is a piece of its own, before anything else
    nfc            text is put into Unicode's composed form
    whole_words    a piece that is a token stays whole, whatever the merges say
    bos            BOS is put before a text where the file does not say
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


def _words_and_numbers(numbers: str) -> str:
    """The pattern of the Llama 3 and Qwen 2 tokenizers, which differ in how numbers are cut."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        rf"|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    )


LLAMA3 = _Splitting(pattern=_words_and_numbers(r"\p{N}{1,3}"), whole_words=True, bos=True)
SPLITTINGS = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(digits=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": _Splitting(pattern=_words_and_numbers(r"\p{N}"), nfc=True),
}


def tokenizer_files(metadata: Mapping[str, Any], *, max_length: int) -> dict[str, bytes]:
    """The two files, by name. `max_length` is the model's context in tokens.

    Raises UnknownTokenizer for a tokenizer of another kind, InputError for metadata that
    contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise UnknownTokenizer(
            f"the GGUF file has a tokenizer of kind {kind!r}",
            hint="gpt2 (byte-level BPE) and llama (SentencePiece BPE) are converted",
        )
    special = _special_tokens(metadata, tokens)
    if kind == "gpt2":
        splitting = _splitting(metadata.get("tokenizer.ggml.pre"))
        tokenizer = _byte_level(metadata, tokens, splitting)
        adds_bos = splitting.bos
    else:
        tokenizer = _sentencepiece(metadata, tokens, unknown=special.get("unk_token"))
        adds_bos = True
    _add_tokens(tokenizer, metadata, tokens)
    before = [special["bos_token"]] if _says(metadata, "bos", adds_bos, special) else []
    after = [special["eos_token"]] if _says(metadata, "eos", False, special) else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *after],
            special_tokens=[(t, tokens.index(t)) for t in {*before, *after}],
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if templates := _templates(metadata):
        config["chat_template"] = templates
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": text.encode(),
    }


def _templates(metadata: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """The chat template; with others by their names, for tools or retrieval, all of them as
    tokenizer_config.json has several."""
    found = {"default": metadata.get(TEMPLATE)}
    found |= {
        key.removeprefix(f"{TEMPLATE}."): value
        for key, value in metadata.items()
        if key.startswith(f"{TEMPLATE}.")
    }
    texts = {name: text for name, text in found.items() if isinstance(text, str)}
    if [*texts] == ["default"]:
        return texts["default"]
    return [{"name": name, "template": text} for name, text in texts.items()]


def _special_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    """bos_token and the like → the token."""
    ids = {name: token_id(metadata, key) for name, key in SPECIAL_TOKENS.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _says(
    metadata: Mapping[str, Any], which: str, default: bool, special: Mapping[str, str]
) -> bool:
    """Whether BOS or EOS is put around a text."""
    wanted = bool(metadata.get(f"tokenizer.ggml.add_{which}_token", default))
    return wanted and f"{which}_token" in special


def _splitting(name: Any) -> _Splitting:
    if name not in SPLITTINGS:
        raise UnknownTokenizer(
            f"the GGUF file splits text by {name!r}, which is not known here",
            hint=f"known are {', '.join(SPLITTINGS)}; else use the model's Hugging Face checkpoint",
        )
    return SPLITTINGS[name]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError("the GGUF file's vocabulary holds a token twice")
    return vocabulary


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], splitting: _Splitting
) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    try:
        model = models.BPE(
            vocab=_vocabulary(tokens), merges=merges, ignore_merges=splitting.whole_words
        )
    # The tokenizers package raises a bare Exception for a merge of tokens that are not there.
    except Exception as error:
        raise InputError(f"the GGUF file's merges do not fit its vocabulary: {error}") from error
    tokenizer = Tokenizer(model)
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits else []
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], *, unknown: str | None
) -> Tokenizer:
    vocabulary = _vocabulary(tokens)
    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise InputError(f"the GGUF file has {len(scores)} scores for {len(tokens)} tokens")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best-scored result first."""
    found = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], -len(left), left, right))
    # By score, then the longer left part; a stable sort keeps the vocabulary's order beyond that.
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Tokens that are matched whole in a text: control tokens, and those a user added."""
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    pairs = list(zip(tokens, kinds, strict=False))
    control = [t for t, kind in pairs if kind in (CONTROL, UNKNOWN)]
    added = [t for t, kind in pairs if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added])
